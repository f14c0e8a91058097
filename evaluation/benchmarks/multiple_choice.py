"""Multiple choice: one letter is generated greedily and compared with the gold letter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from pydantic import NonNegativeInt

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
)
from evaluation.scoring import LETTERS, mean, published_letter, robust_letter


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its options, and which of them is right."""

    query: str
    options: tuple[str, ...]
    gold: int  # index into options

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(LETTERS[: len(self.options)])

    @property
    def prompt(self) -> str:
        """The question as asked, ending in `Answer:`."""
        options = (
            f"{letter}. {option.strip()}"
            for letter, option in zip(self.letters, self.options, strict=True)
        )
        return "\n".join((self.query.strip(), *options, "Answer:"))

    @property
    def shot(self) -> str:
        """The question with its answer, and the blank line that parts it from the next."""
        return f"{self.prompt} {LETTERS[self.gold]}\n\n"

    def item(self, item_id: str, shots: str, category: str | None = None) -> Item:
        truth = LETTERS[self.gold]
        return Item(item_id, shots + self.prompt, truth, self.letters, category)


def question(query: str, options: Sequence[str], gold: int, where: str) -> Question:
    """A checked question; ValueError names the row."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{where} has {len(options)} options; 2 to {len(LETTERS)} have letters")
    if not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where}: its options are no texts: {list(options)!r:.80}")
    if not 0 <= gold < len(options):
        raise ValueError(
            f"{where}: the right answer is none of the {len(options)} options; an unlabelled split "
            "cannot be scored"
        )
    return Question(query, tuple(options), gold)


class MultipleChoice(Benchmark):
    """Items of one data set after the same shots, from the head of another split."""

    num_shots: NonNegativeInt
    split: str

    generation: ClassVar[Mapping[str, Any]] = {"max_tokens": 1}
    robust_rule: ClassVar[str | None] = (
        "a letter also counts as B. (B) **B** 'Answer: B' \\boxed{B}; an unreadable one earns "
        "nothing (published: 1 / number of options, and these forms are unreadable)"
    )

    @abstractmethod
    def question_of(self, row: Row, where: str) -> Question:
        """The question that a row of the data set asks."""

    @property
    @abstractmethod
    def shot_split(self) -> Split:
        """Where the shots come from."""

    @property
    @abstractmethod
    def item_split(self) -> Split:
        """Where the items come from."""

    def splits(self) -> list[Split]:
        return list(dict.fromkeys((self.item_split, self.shot_split)))

    def load(self, source: DataSource) -> Loaded:
        shots: list[Question] = []
        if self.num_shots:
            rows = source.rows(self.shot_split, benchmark=self.name)
            shots = self._questions(islice(rows, self.num_shots), self.shot_split)
        before = "".join(shot.shot for shot in shots)
        asked = self._questions(source.rows(self.item_split, benchmark=self.name), self.item_split)
        items = [each.item(f"{self.split}/{index}", before) for index, each in enumerate(asked)]
        clipped = clipped_note(self.num_shots, len(shots), str(self.shot_split))
        return Loaded(items, clipped)

    def _questions(self, rows: Iterable[Row], split: Split) -> list[Question]:
        return [self.question_of(row, f"{split} row {index}") for index, row in enumerate(rows)]

    def judge(self, item: Item, answer: str) -> Verdict:
        return judge_letter(
            item,
            published=published_letter(answer, item.letters),
            robust=robust_letter(answer, item.letters),
        )

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return micro_figures(verdicts)

    def chance(self, items: Sequence[Item]) -> float | None:
        return mean([1 / len(item.letters) for item in items])


def judge_letter(item: Item, *, published: str | None, robust: str | None) -> Verdict:
    """An unreadable letter is published as a guess."""
    credit = 1 / len(item.letters) if published is None else float(published == item.truth)
    return Verdict(
        extracted=published,
        correct=credit,
        invalid=published is None,
        robust=float(robust == item.truth),
        detail={} if robust == published else {"extracted_robust": robust},
    )


def clipped_note(asked: int, found: int, pool: str) -> tuple[str, ...]:
    """What to report where there are fewer shots than asked for."""
    return (f"{pool} has {found} shots, {asked} were asked for",) if found < asked else ()
