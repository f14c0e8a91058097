"""What a report says of each benchmark, however it is written down.

Shares are 0 to 1. Which examples are shown depends on the items alone, so that a report written
again is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.reasoning_gym import CurvePoint, ReasoningGym, accuracy_curve
from evaluation.published import AT_EQUAL_FLOPS, BY_SIZE, departures
from evaluation.recorded import AnsweredItem, RecordedResults
from evaluation.scoring import mean, standard_error

EXAMPLES_OF_A_KIND = 3
# What `reasoning_gym.difficulty` counts in the short notation.
SHORT_UNITS = {
    "spell_backward": "letters",
    "binary_matrix": "rows",
    "number_sorting": "numbers",
    "count_bits": "bits",
    "ab": "tokens",
}
RIGHT, WRONG, DOUBTED = "right", "wrong", "judged otherwise by the robust rule"


@dataclass(frozen=True, slots=True)
class Share:
    """An accuracy with its standard error, where that is known."""

    value: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class CategoryShare:
    """One subject, subset, task or problem of a benchmark."""

    name: str
    n: int
    accuracy: Share
    robust: float | None


@dataclass(frozen=True, slots=True)
class BenchmarkSummary:
    """One benchmark in figures and examples."""

    label: str
    name: str
    metric: str  # that of `headline`
    headline: Share
    robust: Share | None
    robust_rule: str | None
    chance: float | None
    published: Mapping[str, float]  # by size
    departures: Sequence[str]  # from how the published figure was asked
    n: int
    num_invalid: int
    num_over_long: int
    num_cut_off: int
    other_figures: Mapping[str, Share]
    categories: Sequence[CategoryShare]
    curve: Sequence[CurvePoint]
    examples: Mapping[str, Sequence[AnsweredItem]]  # by RIGHT, WRONG, DOUBTED
    notes: Sequence[str]
    seconds: float
    answer_tokens: int


def summaries(results: RecordedResults) -> list[BenchmarkSummary]:
    """Of every finished benchmark, in the order of results.json."""
    return [
        _summary(label, record, results.items[label], results.model.get("max_context"))
        for label, record in results.benchmarks.items()
    ]


def _summary(
    label: str,
    record: Mapping[str, Any],
    items: Sequence[AnsweredItem],
    max_context: int | None,
) -> BenchmarkSummary:
    figures = {**record["published"], **record["robust"]}
    errors, name, metric = record["standard_errors"], record["benchmark"], record["headline"]
    if metric not in figures:  # AIME asked for other k than 1
        metric = next(key for key in errors or figures if key in figures)
    categories = _categories(items)
    names = {category.name for category in categories}
    robust_metric = f"{metric}_robust"
    shown = (metric, robust_metric)
    return BenchmarkSummary(
        label=label,
        name=name,
        metric=metric,
        headline=Share(figures[metric], errors.get(metric)),
        robust=(
            Share(figures[robust_metric], errors.get(robust_metric))
            if robust_metric in figures
            else None
        ),
        robust_rule=record.get("robust_rule"),
        chance=record.get("chance"),
        published={size: by_name[name] for size, by_name in BY_SIZE.items() if name in by_name},
        departures=departures(record, len(items), max_context),
        n=len(items),
        num_invalid=sum(item.invalid for item in items),
        num_over_long=record["over_long"],
        num_cut_off=record.get("cut_off", 0),
        other_figures={
            key: Share(value, errors.get(key))
            for key, value in figures.items()
            if key not in shown and not is_of_a_category(key, names)
        },
        categories=categories,
        curve=_curve(name, items),
        examples=_examples(items),
        notes=record.get("notes") or (),
        seconds=record.get("seconds") or 0.0,
        answer_tokens=record.get("answer_tokens") or 0,
    )


def model_line(results: RecordedResults) -> str:
    """Which model it was."""
    model = results.model
    told = [str(model["path"])]
    if model.get("epoch") is not None:
        told.append(f"epoch {model['epoch']:g}, step {model['step']:,}")
    told.append(f"{model['weights']} weights" if model.get("weights") else "")
    told.append(str(model.get("net") or ""))
    if model.get("parameters"):
        told.append(f"{model['parameters'] / 1e6:,.2f} M parameters")
    if model.get("depth"):
        told.append(" ".join(f"{key}={value}" for key, value in model["depth"].items()))
    told += [str(model.get(key) or "") for key in ("dtype", "device")]
    return ", ".join(filter(None, told))


def run_line(results: RecordedResults) -> str:
    """When and how long."""
    record = results.record
    seconds = record.get("seconds") or 0.0
    return ", ".join(
        (
            f"begun {record.get('started_at', 'at an unknown time')}",
            f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:,.1f} h",
            str(record.get("engine") or "engine unknown"),
        )
    )


def unfinished_line(results: RecordedResults) -> str | None:
    """What is still to come; None: nothing."""
    unfinished = results.record.get("unfinished") or []
    if not unfinished:
        return None
    return f"Not finished yet: {', '.join(unfinished)}. The same command goes on."


def means(results: RecordedResults) -> dict[str, tuple[Share, str]]:
    """Means over benchmarks that `evaluation.core` wrote (CORE, chat), and of what, in words."""
    found = results.record.get("means") or {}
    return {
        name: (Share(mean["value"], mean.get("standard_error")), str(mean.get("of") or ""))
        for name, mean in found.items()
    }


def settings_rows(results: RecordedResults) -> list[tuple[str, str]]:
    """All that tells this evaluation from another, as names and texts."""
    record = results.record
    rows: list[tuple[str, str]] = []
    for part in ("model", "versions", "settings"):
        rows += _flat(part, record.get(part) or {})
    rows.append(("settings_fingerprint", str(record.get("settings_fingerprint"))))
    for label, each in results.benchmarks.items():
        rows.append((f"{label}: data", str(each.get("data_fingerprint"))))
    return rows


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, each in value.items() for row in _flat(f"{name}.{key}", each)]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def extent(summary: BenchmarkSummary) -> str:
    """How many items, how long, and what went wrong on the way."""
    told = [f"{summary.n:,} items", f"{summary.seconds:,.0f} s"]
    if summary.answer_tokens:
        told.append(f"{summary.answer_tokens / max(1, summary.n):,.1f} tokens an answer")
    counts = {
        "invalid": summary.num_invalid,
        "over-long": summary.num_over_long,
        "cut off": summary.num_cut_off,
    }
    return ", ".join([*told, *(f"{count:,} {name}" for name, count in counts.items() if count)])


def curve_unit(task: str, curve: Sequence[CurvePoint]) -> str:
    """What the difficulty of a task counts. Levels of curricula begin at 0, short tasks do not."""
    is_short = all(point.difficulty > 0 for point in curve)
    return SHORT_UNITS.get(task, "difficulty") if is_short else "level"


def filled_columns(
    names: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in every row."""
    kept = [at for at in range(len(names)) if any(row[at] for row in rows)]
    return [names[at] for at in kept], [[row[at] for at in kept] for row in rows]


def equal_flops(found: Sequence[BenchmarkSummary]) -> dict[str, float]:
    """This model's figures for the table at equal training FLOPs, where it has any."""
    names = next(iter(AT_EQUAL_FLOPS.values()))
    return {each.name: each.headline.value for each in found if each.name in names}


def is_of_a_category(key: str, names: Collection[str]) -> bool:
    """Counts, and what a breakdown by these categories shows already: `acc_algebra`, `3_valid`."""
    prefix, _, rest = key.partition("_")
    is_part = rest in names and prefix in ("n", "acc", "invalid")
    return key in ("n", "invalid") or is_part or key.endswith(("_valid", "_cons_count"))


def _categories(items: Sequence[AnsweredItem]) -> list[CategoryShare]:
    groups: dict[str, list[AnsweredItem]] = {}
    for item in items:
        if item.category is not None:
            groups.setdefault(item.category, []).append(item)
    found = []
    for name, members in groups.items():
        credits = [item.correct for item in members]
        robust = [item.robust for item in members if item.robust is not None]
        found.append(
            CategoryShare(
                name,
                len(members),
                Share(mean(credits), standard_error(credits)),
                mean(robust) if len(robust) == len(members) else None,
            )
        )
    return found


def _curve(name: str, items: Sequence[AnsweredItem]) -> list[CurvePoint]:
    if name != ReasoningGym.name:
        return []
    return accuracy_curve([item.item for item in items], [item.verdict for item in items])


def _examples(items: Sequence[AnsweredItem]) -> dict[str, list[AnsweredItem]]:
    kinds: dict[str, Callable[[AnsweredItem], bool]] = {
        RIGHT: lambda item: item.correct == 1,
        WRONG: lambda item: item.correct < 1,
        DOUBTED: lambda item: item.robust is not None and (item.robust == 1) != (item.correct == 1),
    }
    chosen = {kind: _spread([item for item in items if fits(item)]) for kind, fits in kinds.items()}
    return {kind: some for kind, some in chosen.items() if some}


def _spread(items: Sequence[AnsweredItem]) -> list[AnsweredItem]:
    """A few from beginning to end, so that they come from several categories."""
    count = min(EXAMPLES_OF_A_KIND, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
