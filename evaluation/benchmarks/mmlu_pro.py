"""MMLU-Pro: up to ten options and room to reason; the mean over categories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from evaluation.benchmarks.averages import macro_figures
from evaluation.benchmarks.multiple_choice import judge_letter
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
from evaluation.scoring import LETTERS, last_box, mean, robust_letter

DATASET = "TIGER-Lab/MMLU-Pro"
_STATED = re.compile(
    r"(?:[Aa]nswer|ANSWER|option|choice)(?:\s+is)?\s*:?\**\s*"
    r"(?:[(\[{*]|\\text\{)*([A-Z])(?![A-Za-z0-9'])",
    re.ASCII,
)
_BRACKETED = re.compile(r"\(\s*([A-Z])\s*\)", re.ASCII)


class MMLUPro(Benchmark):
    """The question and its options in brackets; the letter stands in a box, or comes last."""

    split: str = "test"

    name: ClassVar[str] = "MMLUPro"
    robust_rule: ClassVar[str | None] = (
        "the box, else the last 'answer is X', else the last (X), else the whole text as one "
        "letter; unreadable earns nothing (published: 1 / number of options, and any capital "
        "letter that stands alone counts, so 'A nice day' reads A)"
    )

    def splits(self) -> list[Split]:
        return [Split(DATASET, self.split)]

    def load(self, source: DataSource) -> Loaded:
        (split,) = self.splits()
        rows = enumerate(source.rows(split, benchmark=self.name))
        return Loaded([self._item(row, index, f"{split} row {index}") for index, row in rows])

    def _item(self, row: Row, index: int, where: str) -> Item:
        options = take(row, "options", (list, tuple), where)
        letters = tuple(LETTERS[: len(options)])
        gold = take(row, "answer", str, where)
        if gold not in letters:
            raise ValueError(f"{where}: answer={gold!r} is no letter of its {len(options)} options")
        lines = [f"({letter}) {option}\n" for letter, option in zip(letters, options, strict=True)]
        prompt = f"{take(row, 'question', str, where)}\nOptions:\n{''.join(lines)}"
        category = take(row, "category", str, where)
        return Item(f"{self.split}/{index}", prompt, gold, letters, category)

    def judge(self, item: Item, answer: str) -> Verdict:
        return judge_letter(
            item,
            published=last_letter(answer, item.letters),
            robust=stated_letter(answer, item.letters),
        )

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return macro_figures(items, verdicts)

    def chance(self, items: Sequence[Item]) -> float | None:
        strata: dict[str | None, list[float]] = {}
        for item in items:
            strata.setdefault(item.category, []).append(1 / len(item.letters))
        return mean([mean(each) for each in strata.values()])


def last_letter(text: str, letters: Sequence[str]) -> str | None:
    """Published: the last `(X)`, else the last X that is a word, in the box where it holds text."""
    within = last_box(text) or text
    for pattern in (r"\(([{}])\)", r"\b([{}])\b"):
        found = re.findall(pattern.format("".join(letters)), within)
        if found:
            return found[-1]
    return None


def stated_letter(text: str, letters: Sequence[str]) -> str | None:
    """The letter that the text gives as its answer."""
    boxed = last_box(text)
    if boxed:
        return robust_letter(boxed, letters)
    for pattern in (_STATED, _BRACKETED):
        found = [letter for letter in pattern.findall(text) if letter in letters]
        if found:
            return found[-1]
    return robust_letter(text, letters)
