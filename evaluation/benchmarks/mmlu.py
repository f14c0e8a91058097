"""MMLU: 57 subjects, each asked after shots of its own; the mean over subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import NonNegativeInt

from evaluation.benchmarks.averages import macro_figures
from evaluation.benchmarks.multiple_choice import MultipleChoice, Question, clipped_note, question
from evaluation.benchmarks.protocol import (
    DataSource,
    Figures,
    Item,
    Loaded,
    Row,
    Split,
    Verdict,
    take,
)

DATASET, CONFIG, SHOT_SPLIT = "cais/mmlu", "all", "dev"


class MMLU(MultipleChoice):
    """`special_shots` gives single subjects another number of shots."""

    split: str = "test"
    num_shots: NonNegativeInt = 5
    special_shots: Mapping[str, NonNegativeInt] | None = None

    name: ClassVar[str] = "MMLU"

    @property
    def item_split(self) -> Split:
        return Split(DATASET, self.split, CONFIG)

    @property
    def shot_split(self) -> Split:
        return Split(DATASET, SHOT_SPLIT, CONFIG)

    def question_of(self, row: Row, where: str) -> Question:
        return question(
            take(row, "question", str, where),
            take(row, "choices", (list, tuple), where),
            take(row, "answer", int, where),
            where,
        )

    def load(self, source: DataSource) -> Loaded:
        pool = self._by_subject(source, self.shot_split)
        shots, notes = {}, []
        asked = self._in_file_order(source, self.item_split)
        special = self.special_shots or {}
        subjects = list(dict.fromkeys(subject for subject, _ in asked))
        for subject in subjects:
            count = special.get(subject, self.num_shots)
            chosen = pool.get(subject, [])[:count]
            shots[subject] = "".join(each.shot for each in chosen)
            notes += clipped_note(count, len(chosen), f"{self.shot_split} of {subject}")
        unknown = [subject for subject in special if subject not in shots and subject not in pool]
        notes += [f"special_shots names {subject}, which is no subject" for subject in unknown]
        items = [
            each.item(f"{self.split}/{index}", shots[subject], subject)
            for index, (subject, each) in enumerate(asked)
        ]
        return Loaded(items, tuple(notes))

    def _in_file_order(self, source: DataSource, split: Split) -> list[tuple[str, Question]]:
        rows = enumerate(source.rows(split, benchmark=self.name))
        located = ((row, f"{split} row {index}") for index, row in rows)
        return [
            (take(row, "subject", str, where), self.question_of(row, where))
            for row, where in located
        ]

    def _by_subject(self, source: DataSource, split: Split) -> dict[str, list[Question]]:
        pool: dict[str, list[Question]] = {}
        for subject, each in self._in_file_order(source, split):
            pool.setdefault(subject, []).append(each)
        return pool

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return macro_figures(items, verdicts)
