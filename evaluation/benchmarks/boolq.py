"""BoolQ: a passage and a question to answer with yes or no."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt

from evaluation.benchmarks.multiple_choice import MultipleChoice, Question, question
from evaluation.benchmarks.protocol import Row, Split, take

DATASET, SHOT_SPLIT = "google/boolq", "train"
OPTIONS = ("Yes", "No")


class BoolQ(MultipleChoice):
    """The passage, then the question as a sentence."""

    split: str = "validation"
    num_shots: NonNegativeInt = 5

    name: ClassVar[str] = "BoolQ"

    @property
    def item_split(self) -> Split:
        return Split(DATASET, self.split)

    @property
    def shot_split(self) -> Split:
        return Split(DATASET, SHOT_SPLIT)

    def question_of(self, row: Row, where: str) -> Question:
        passage = take(row, "passage", str, where)
        asked = take(row, "question", str, where).capitalize()
        is_yes = take(row, "answer", bool, where)
        return question(f"{passage}\nQuestion: {asked}?", OPTIONS, 0 if is_yes else 1, where)
