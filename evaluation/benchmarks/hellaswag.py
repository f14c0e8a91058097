"""HellaSwag: which ending goes on from a described scene."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt

from evaluation.benchmarks.multiple_choice import MultipleChoice, Question, question
from evaluation.benchmarks.protocol import Row, Split, take

DATASET, SHOT_SPLIT = "Rowan/hellaswag", "train"


class HellaSwag(MultipleChoice):
    """The context, and its second part with a capital first letter."""

    split: str = "validation"
    num_shots: NonNegativeInt = 10

    name: ClassVar[str] = "HellaSwag"

    @property
    def item_split(self) -> Split:
        return Split(DATASET, self.split)

    @property
    def shot_split(self) -> Split:
        return Split(DATASET, SHOT_SPLIT)

    def question_of(self, row: Row, where: str) -> Question:
        context = take(row, "ctx_a", str, where)
        context += f" {take(row, 'ctx_b', str, where).capitalize()}"
        label = take(row, "label", (str, int), where)
        if not str(label).isdecimal():
            raise ValueError(f"{where}: label={label!r} is no index of an ending; unlabelled?")
        return question(
            f"{context}\nQuestion: Which is the most logical continuation?",
            take(row, "endings", (list, tuple), where),
            int(label),
            where,
        )
