"""Bootstrap intervals of exact accuracy over seeds and items.

A result is a table of right (1) and wrong (0) answers, [seeds, items], for each task. Seeds and
items are drawn anew, with replacement; the mean over tasks weighs tasks equally. Of n seeds n - 1
are drawn: that makes the variance of their mean unbiased, which matters for so few. Two seeds still
say little, and one says nothing of seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Answers = Mapping[str, NDArray[np.float64]]  # by task, [seeds, items]
Replicates = NDArray[np.float64]  # [replicates]
MEAN = "mean"
REPLICATES, COVERAGE = 4_000, 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def accuracies(answers: Answers) -> dict[str, Interval]:
    """Of each task, and of the mean over tasks."""
    point = _points(answers)
    drawn = _replicates([answers])[0]
    return {task: interval_of(point[task], drawn[task]) for task in point}


def differences(answers: Answers, baseline: Answers) -> dict[str, Interval]:
    """The first minus the second, paired by item: both are asked the same ones.

    Seeds are drawn for each by itself: equal seeds of two nets have nothing in common.
    """
    points = _points(answers), _points(baseline)
    drawn = _replicates([answers, baseline])
    return {
        task: interval_of(points[0][task] - points[1][task], drawn[0][task] - drawn[1][task])
        for task in points[0]
    }


def _points(answers: Answers) -> dict[str, float]:
    by_task = {task: float(table.mean()) for task, table in answers.items()}
    return {**by_task, MEAN: float(np.mean([*by_task.values()]))}


def _replicates(all_answers: Sequence[Answers]) -> list[dict[str, Replicates]]:
    """Accuracies of drawn seeds and items; the same items for all of `all_answers`."""
    random = np.random.default_rng(0)
    num_seeds = [len(next(iter(each.values()))) for each in all_answers]
    seed_weights = [_weights(random, number, draws=max(1, number - 1)) for number in num_seeds]
    drawn: list[dict[str, Replicates]] = [{} for _ in all_answers]
    for task in all_answers[0]:
        num_items = all_answers[0][task].shape[1]
        item_weights = _weights(random, num_items, draws=num_items)
        for index, each in enumerate(all_answers):
            # A seed drawn for one task is drawn for all: they are one run.
            by_items = item_weights @ each[task].T  # [replicates, seeds]
            drawn[index][task] = (seed_weights[index] * by_items).sum(1)
    for each in drawn:
        each[MEAN] = np.mean([*each.values()], axis=0)
    return drawn


def _weights(random: np.random.Generator, count: int, *, draws: int) -> NDArray[np.float64]:
    """How often each of `count` things is drawn, as shares: [replicates, count]."""
    return random.multinomial(draws, np.full(count, 1 / count), size=REPLICATES) / draws


def interval_of(value: float, replicates: Replicates) -> Interval:
    """The estimate with the middle 95 % of its replicates."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return Interval(value, float(low), float(high))
