"""ARC: grade-school science questions."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeInt

from evaluation.benchmarks.multiple_choice import MultipleChoice, Question, question
from evaluation.benchmarks.protocol import Row, Split, take

DATASET, SHOT_SPLIT = "allenai/ai2_arc", "validation"


class ARC(MultipleChoice):
    """Labels of a row may be letters or digits; options are asked as A, B, ... either way."""

    split: str = "test"
    subset: str = "ARC-Challenge"
    num_shots: NonNegativeInt = 25

    name: ClassVar[str] = "ARC"

    @property
    def item_split(self) -> Split:
        return Split(DATASET, self.split, self.subset)

    @property
    def shot_split(self) -> Split:
        return Split(DATASET, SHOT_SPLIT, self.subset)

    def question_of(self, row: Row, where: str) -> Question:
        choices = take(row, "choices", dict, where)
        labels = take(choices, "label", (list, tuple), where)
        key = take(row, "answerKey", str, where)
        if key not in labels:
            raise ValueError(f"{where}: answerKey={key!r} is none of its labels {list(labels)}")
        return question(
            take(row, "question", str, where),
            take(choices, "text", (list, tuple), where),
            labels.index(key),
            where,
        )
