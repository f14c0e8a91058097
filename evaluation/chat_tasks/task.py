"""What all chat tasks share: how many items, and accuracy with chance taken out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from pydantic import PositiveInt

from evaluation.benchmarks.protocol import Benchmark, Figures, Item, Verdict
from evaluation.core.prompts import ORDER_SEED
from evaluation.core.task import centred_figures


class ChatTask(Benchmark):
    """Items that are asked as prompts, without shots."""

    max_items: PositiveInt | None = None  # shuffled, then cut; None: all, in file order

    guessing: ClassVar[float] = 0.0  # what it earns

    def cut(self, items: Sequence[Item]) -> list[Item]:
        """The items that are asked."""
        if self.max_items is None:
            return list(items)
        shuffled = list(items)
        random.Random(ORDER_SEED).shuffle(shuffled)
        return shuffled[: self.max_items]

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return centred_figures(verdicts, self.guessing)

    def chance(self, items: Sequence[Item]) -> float | None:
        return self.guessing
