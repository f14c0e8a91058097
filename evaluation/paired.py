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
    replicates: Replicates = field(repr=False)  # of the difference


def shared_items(
    first: RecordedResults, second: RecordedResults, label: str, *, other_prompts: bool
) -> tuple[list[tuple[AnsweredItem, AnsweredItem]], list[str]]:
    """Pairs of items by id, and what differs. ValueError where the data cannot be paired.

    With `other_prompts` items of different data are paired where id and truth are the same.
    """
    records = [each.benchmarks[label] for each in (first, second)]
    notes = [
        f"{key}: {_short(one)} and {_short(other)}"
        for key, one, other in _differing_settings(*records)
    ]
    has_other_data = records[0]["data_fingerprint"] != records[1]["data_fingerprint"]
    if has_other_data and not other_prompts:
        raise ValueError(
            "the data or its prompts differ (fingerprints "
            f"{records[0]['data_fingerprint'][:8]} and {records[1]['data_fingerprint'][:8]}); "
            "other_prompts=true pairs items by id where the truths are the same"
        )
    theirs = {item.id: item for item in second.items[label]}
    pairs = [(item, theirs[item.id]) for item in first.items[label] if item.id in theirs]
    same = [pair for pair in pairs if pair[0].truth == pair[1].truth]
    most = max(len(first.items[label]), len(second.items[label]))
    if has_other_data:
        notes.append(f"other data or prompts: {len(same):,} of {most:,} items have one truth")
    if not same:
        raise ValueError("no item is the same in both")
    return same, notes


def compare_benchmark(
    first: RecordedResults, second: RecordedResults, label: str, *, other_prompts: bool = False
) -> PairedBenchmark:
    """ValueError where the two cannot be compared."""
    pairs, notes = shared_items(first, second, label, other_prompts=other_prompts)
    record = first.benchmarks[label]
    units = [
        _units(each.benchmarks[label], [pair[side] for pair in pairs])
        for side, each in enumerate((first, second))
    ]
    figures = [_figure(each, lambda unit: unit.published) for each in units]
    for each, figure in zip((first, second), figures, strict=True):
        stored = each.benchmarks[label]["published"][record["headline"]]
        is_whole = len(pairs) == len(each.items[label])
        if is_whole and abs(stored - figure) > EQUAL:
            notes.append(f"{each.folder}: on record is {stored:.4f}, its items make {figure:.4f}")
    changes = _changes(*units, lambda unit: unit.published)
    drawn = _replicates(changes)
    has_robust = all(unit.robust is not None for each in units for unit in each.values())
    robust = _changes(*units, lambda unit: unit.robust or 0.0) if has_robust else None
    return PairedBenchmark(
        label=label,
        metric=record["headline"],
        num_units=len(units[0]),
        first=figures[0],
        second=figures[1],
        difference=interval_of(figures[1] - figures[0], drawn),
        robust_difference=interval_of(_mean(robust), _replicates(robust)) if robust else None,
        gained=[one.id for one, other in pairs if one.correct < 1 and other.correct == 1],
        lost=[one.id for one, other in pairs if one.correct == 1 and other.correct < 1],
        notes=notes,
        replicates=drawn,
    )


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


def _figure(units: Mapping[str, Unit], value: Callable[[Unit], float]) -> float:
    strata: dict[str, list[float]] = {}
    for unit in units.values():
        strata.setdefault(unit.stratum, []).append(value(unit))
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


def _differing_settings(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
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
