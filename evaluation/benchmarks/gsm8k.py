"""GSM8k: word problems whose answer is an integer."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar

from evaluation.benchmarks.averages import micro_figures
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Figures,
    Item,
    Loaded,
    Row,
    Split,
    Verdict,
    take,
)
from evaluation.scoring import published_integer, robust_number


class GSM8k(Benchmark):
    """The question alone; the answer is an integer, in a box or alone."""

    split: str = "test"

    name: ClassVar[str] = "GSM8k"
    robust_rule: ClassVar[str | None] = (
        "the last number of the box, else of the text, must equal the truth exactly (published: "
        "int(float()) of the box or the whole text, so 8.99 is 8, and 'it is 8' unreadable)"
    )

    def splits(self) -> list[Split]:
        return [Split("gsm8k", self.split, "main")]

    def load(self, source: DataSource) -> Loaded:
        (split,) = self.splits()
        items = []
        for index, row in enumerate(source.rows(split, benchmark=self.name)):
            where = f"{split} row {index}"
            truth = gold_integer(row, where)
            items.append(Item(f"{self.split}/{index}", take(row, "question", str, where), truth))
        return Loaded(items)

    def judge(self, item: Item, answer: str) -> Verdict:
        extracted, number = published_integer(answer), robust_number(answer)
        return Verdict(
            extracted=extracted,
            correct=float(extracted == item.truth),
            invalid=extracted is None,
            robust=float(number is not None and number == Decimal(item.truth)),
        )

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return micro_figures(verdicts)


def gold_integer(row: Row, where: str) -> int:
    """What follows `####` in the worked answer."""
    answer = take(row, "answer", str, where)
    digits = answer.split("####")[-1].replace(",", "").strip()
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"{where}: what follows #### is no integer: {digits[:80]!r}") from None
