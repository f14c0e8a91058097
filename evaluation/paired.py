"""Paired differences of two evaluations, with bootstrap intervals over what both answered.

A benchmark's figure is a mean over units (items; for AIME problems with all their samples), or the
mean over categories of such means; units are drawn anew within their category. A draw of n units
out of n matters only by how often each distinct difference comes: that is multinomial, so no table
of replicates by units is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.benchmarks.aime import AIMEMajorityVoting
from evaluation.benchmarks.drop import DROP
from evaluation.benchmarks.mmlu import MMLU
from evaluation.benchmarks.mmlu_pro import MMLUPro
from evaluation.benchmarks.reasoning_gym import ReasoningGym
from evaluation.comparison.intervals import REPLICATES, Interval, interval_of
from evaluation.recorded import AnsweredItem, RecordedResults

OVER_CATEGORIES = frozenset((MMLU.name, MMLUPro.name, ReasoningGym.name))
EQUAL = 1e-9
Replicates = NDArray[np.float64]  # [replicates]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is drawn as one."""

    stratum: str  # drawn within it
    published: float
    robust: float | None


@dataclass(frozen=True, slots=True)
class PairedBenchmark:
    """One benchmark that two evaluations answered, over what both have."""

    label: str
    metric: str
    num_units: int
    first: float
    second: float
    difference: Interval  # second minus first
    robust_difference: Interval | None
    gained: Sequence[str]  # ids of items that the second alone has right
    lost: Sequence[str]  # that the first alone has right
    notes: Sequence[str]
    num_lone: int  # categories of one unit, of whose spread nothing is known
    replicates: Replicates = field(repr=False)  # of the difference

    def is_clear(self, difference: Interval) -> bool:
        """Whether an interval of this benchmark excludes 0 and is to be trusted."""
        return difference.excludes_zero and not self.num_lone


def shared_ids(
    all_results: Sequence[RecordedResults], label: str, *, other_prompts: bool
) -> frozenset[str]:
    """The items that all have answered, with the truth that the first has.

    ValueError where the data differ, unless `other_prompts` says that ids and truths are to do.
    """
    prints = [each.benchmarks[label]["data_fingerprint"] for each in all_results]
    if len(set(prints)) > 1 and not other_prompts:
        raise ValueError(
            f"the data or the prompts differ (fingerprints {', '.join(each[:8] for each in prints)}"
            "); other_prompts=true pairs items of the same id and truth all the same"
        )
    truths = [{item.id: item.truth for item in each.items[label]} for each in all_results]
    shared = frozenset(
        key
        for key, truth in truths[0].items()
        if all(key in each and each[key] == truth for each in truths)
    )
    if not shared:
        raise ValueError("no item is the same in all")
    return shared


def compare_benchmark(
    first: RecordedResults, second: RecordedResults, label: str, ids: frozenset[str]
) -> PairedBenchmark:
    """The second against the first, over items that both have answered.

    ValueError where one has not the figure that is compared.
    """
    records = [each.benchmarks[label] for each in (first, second)]
    for each in records:
        if each["headline"] not in each["published"]:
            raise ValueError(f"there is no figure {each['headline']} (pass_k without 1?)")
    items = [[item for item in each.items[label] if item.id in ids] for each in (first, second)]
    units = [_units(record, some) for record, some in zip(records, items, strict=True)]
    figures = [_figure(each) for each in units]
    before, now = units
    changes = _changes(before, now, lambda unit: unit.published)
    num_lone = sum(len(each) == 1 for each in changes)
    drawn = _replicates(changes)
    has_robust = all(unit.robust is not None for each in units for unit in each.values())
    robust = _changes(before, now, lambda unit: unit.robust or 0.0) if has_robust else None
    right = [{item.id for item in each if item.correct == 1} for each in items]
    return PairedBenchmark(
        label=label,
        metric=records[0]["headline"],
        num_units=len(units[0]),
        first=figures[0],
        second=figures[1],
        difference=interval_of(figures[1] - figures[0], drawn),
        robust_difference=interval_of(_mean(robust), _replicates(robust)) if robust else None,
        gained=[item.id for item in items[0] if item.id in right[1] - right[0]],
        lost=[item.id for item in items[0] if item.id in right[0] - right[1]],
        notes=[
            *_notes(first, figures[0], label, ids),
            *_notes(second, figures[1], label, ids),
            *(f"{key}: {_short(one)}, then {_short(now)}" for key, one, now in _changed(*records)),
            *([f"{num_lone} categories of one item: the interval is too narrow"] * (num_lone > 0)),
        ],
        num_lone=num_lone,
        replicates=drawn,
    )


def _notes(results: RecordedResults, figure: float, label: str, ids: frozenset[str]) -> list[str]:
    """What of one evaluation is not as its record says, or left out."""
    record, items = results.benchmarks[label], results.items[label]
    if len(ids) < len(items):
        return [f"{len(items) - len(ids):,} of {len(items):,} items of {results.folder} left out"]
    stored = record["published"][record["headline"]]
    if abs(stored - figure) > EQUAL:
        return [f"{results.folder} has {stored:.4f} on record, but its items make {figure:.4f}"]
    return []


def mean_difference(compared: Sequence[PairedBenchmark]) -> Interval:
    """Of the mean over benchmarks, each weighed the same; items of each are drawn by themselves."""
    value = float(np.mean([each.difference.value for each in compared]))
    return interval_of(value, np.mean([each.replicates for each in compared], axis=0))


def _units(record: Mapping[str, Any], items: Sequence[AnsweredItem]) -> dict[str, Unit]:
    name = record["benchmark"]
    if name == AIMEMajorityVoting.name:
        return _polls(record, items)
    is_over_categories = name in OVER_CATEGORIES
    return {
        item.id: Unit(
            (item.category or "") if is_over_categories else "",
            item.detail["f1"] if name == DROP.name else item.correct,
            item.robust,
        )
        for item in items
    }


def _polls(record: Mapping[str, Any], items: Sequence[AnsweredItem]) -> dict[str, Unit]:
    """A unit per problem: its samples make one vote."""
    benchmark = AIMEMajorityVoting.model_validate(record.get("settings") or {})
    metric = record["headline"]
    problems: dict[str, list[AnsweredItem]] = {}
    for item in items:
        problems.setdefault(item.category or "", []).append(item)
    units = {}
    for name, samples in problems.items():
        figures = benchmark.figures([each.item for each in samples], [e.verdict for e in samples])
        robust = figures.robust.get(f"{metric}_robust")
        units[name] = Unit("", figures.published[metric], robust)
    return units


def _figure(units: Mapping[str, Unit]) -> float:
    strata: dict[str, list[float]] = {}
    for unit in units.values():
        strata.setdefault(unit.stratum, []).append(unit.published)
    return float(np.mean([np.mean(each) for each in strata.values()]))


def _changes(
    first: Mapping[str, Unit], second: Mapping[str, Unit], value: Callable[[Unit], float]
) -> list[NDArray[np.float64]]:
    """Second minus first by unit, one array per stratum."""
    strata: dict[str, list[float]] = {}
    for name, unit in first.items():
        strata.setdefault(unit.stratum, []).append(value(second[name]) - value(unit))
    return [np.array(each) for each in strata.values()]


def _mean(changes: Sequence[NDArray[np.float64]]) -> float:
    return float(np.mean([each.mean() for each in changes]))


def _replicates(changes: Sequence[NDArray[np.float64]]) -> Replicates:
    """Means over strata of means over units drawn anew."""
    random = np.random.default_rng(0)
    total = np.zeros(REPLICATES)
    for each in changes:
        values, counts = np.unique(each, return_counts=True)
        drawn = random.multinomial(len(each), counts / len(each), size=REPLICATES)
        total += drawn @ values / len(each)
    return total / len(changes)


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    flat = [
        {
            **(each.get("settings") or {}),
            **(each.get("generation") or {}),
            "prompt_template": each.get("prompt_template"),
            "benchmark": each["benchmark"],
        }
        for each in (one, other)
    ]
    keys = [key for key in dict.fromkeys((*flat[0], *flat[1])) if key != "batch_size"]
    pairs = [(key, flat[0].get(key), flat[1].get(key)) for key in keys]
    return [(key, mine, theirs) for key, mine, theirs in pairs if mine != theirs]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
