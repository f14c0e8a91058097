"""Winogrande: which of two things the gap in a sentence stands for."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt

from evaluation.benchmarks.multiple_choice import MultipleChoice, Question, question
from evaluation.benchmarks.protocol import Row, Split, take

DATASET, CONFIG, SHOT_SPLIT = "allenai/winogrande", "winogrande_debiased", "train"


class Winogrande(MultipleChoice):
    """The sentence with its gap, and two options."""

    split: str = "validation"
    num_shots: NonNegativeInt = 5

    name: ClassVar[str] = "Winogrande"

    @property
    def item_split(self) -> Split:
        return Split(DATASET, self.split, CONFIG)

    @property
    def shot_split(self) -> Split:
        return Split(DATASET, SHOT_SPLIT, CONFIG)

    def question_of(self, row: Row, where: str) -> Question:
        answer = take(row, "answer", (str, int), where)
        if str(answer) not in ("1", "2"):
            raise ValueError(f"{where}: answer={answer!r} is neither 1 nor 2; unlabelled?")
        options = [take(row, column, str, where) for column in ("option1", "option2")]
        return question(take(row, "sentence", str, where), options, int(answer) - 1, where)
