"""DROP: questions on a passage that take counting, sorting and adding; EM and F1."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from evaluation.benchmarks.averages import known, problems
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
from evaluation.drop_metric import drop_em_f1
from evaluation.scoring import mean, standard_error

DATASET, SHOT_SPLIT = "EleutherAI/drop", "train"


@dataclass(frozen=True, slots=True)
class FixedShot:
    """A row of the train split by which the published prompts begin."""

    opening: str  # of its passage
    question: str
    answer: str
    passage_digest: str  # first 16 hex digits of SHA-256
    shot_digest: str  # of passage, question and answer as written into the prompt


SHOTS = (
    FixedShot(
        "To start the season, the Lions traveled",
        "How many points did the buccaneers need to tie in the first?",
        "3",
        "6b7b625c004a05db",
        "03d236070c576dee",
    ),
    FixedShot(
        "Trying to snap a two-game skid, the",
        "How many games had the Bills won before this game?",
        "0",
        "b87ee6d66cb7da78",
        "24d7836c54f1be0a",
    ),
    FixedShot(
        "The French king, John II, had been",
        "How many years before Navarrase used the captivity of John II?",
        "9",
        "96ff4fa0e38e2810",
        "67c827ad1c96a797",
    ),
)


class DROP(Benchmark):
    """The fixed shots, the passage and the question."""

    split: str = "validation"
    num_shots: int = Field(default=len(SHOTS), ge=0, le=len(SHOTS))

    name: ClassVar[str] = "DROP"
    headline: ClassVar[str] = "f1"

    def splits(self) -> list[Split]:
        shot_split = [Split(DATASET, SHOT_SPLIT)] if self.num_shots else []
        return [Split(DATASET, self.split), *shot_split]

    def load(self, source: DataSource) -> Loaded:
        split = Split(DATASET, self.split)
        rows = enumerate(source.rows(split, benchmark=self.name))
        before, notes = self._shots(source)
        return Loaded([self._item(row, index, split, before) for index, row in rows], notes)

    def _item(self, row: Row, index: int, split: Split, before: str) -> Item:
        where = f"{split} row {index}"
        passage, question = (take(row, name, str, where) for name in ("passage", "question"))
        prompt = f"{before}{passage}\nQ: {question}\nA:"
        return Item(f"{self.split}/{index}", prompt, accepted_answers(row, where))

    def _shots(self, source: DataSource) -> tuple[str, tuple[str, ...]]:
        wanted = SHOTS[: self.num_shots]
        if not wanted:
            return "", ()
        try:
            found = find_shots(source.rows(Split(DATASET, SHOT_SPLIT), benchmark=self.name), wanted)
        except FileNotFoundError as error:
            return "", (f"asked without its {len(wanted)} published shots: {error}",)
        texts, notes = [], []
        for shot in wanted:
            if shot not in found:
                notes.append(f"the shot {shot.question!r} is not in {DATASET} {SHOT_SPLIT}")
                continue
            passage = found[shot]
            texts.append(f"{passage}\nQ: {shot.question}\nA: {shot.answer}")
            for text, digest in ((passage, shot.passage_digest), (texts[-1], shot.shot_digest)):
                if digest_of(text) != digest:
                    notes.append(
                        f"the shot {shot.question!r} differs from the published one: "
                        f"{digest_of(text)} instead of {digest}"
                    )
        return "".join(f"{text}\n\n" for text in texts), tuple(notes)

    def judge(self, item: Item, answer: str) -> Verdict:
        text = answer.strip()
        em, f1 = drop_em_f1(text, item.truth)
        return Verdict(text, em, invalid=False, detail={"em": em, "f1": f1})

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        per_item = {key: [verdict.detail[key] for verdict in verdicts] for key in ("em", "f1")}
        published: dict[str, float] = {"n": len(verdicts)}
        published |= {key: mean(values) for key, values in per_item.items()}
        errors = known({key: standard_error(values) for key, values in per_item.items()})
        return Figures(published, {}, errors, problems(verdicts))


def find_shots(rows: Iterator[Row], wanted: Sequence[FixedShot]) -> dict[FixedShot, str]:
    """The passages of the shots that are there; reads no further than to the last of them."""
    found: dict[FixedShot, str] = {}
    for index, row in enumerate(rows):
        where = f"{DATASET} {SHOT_SPLIT} row {index}"
        passage, question = (take(row, name, str, where) for name in ("passage", "question"))
        for shot in wanted:
            is_it = question == shot.question and passage.startswith(shot.opening)
            if is_it and shot not in found:
                found[shot] = passage
        if len(found) == len(wanted):
            break
    return found


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def accepted_answers(row: Row, where: str) -> list[list[str]]:
    """The spans of the answer and of each validated answer, without repetitions."""
    validated = take(row, "validated_answers", dict, where)
    columns = [take(validated, name, (list, tuple), where) for name in ("number", "date", "spans")]
    candidates = [take(row, "answer", dict, where)]
    candidates += [
        {"number": number, "date": date, "spans": spans}
        for number, date, spans in zip(*columns, strict=True)
    ]
    answers: list[list[str]] = []
    for candidate in candidates:
        spans = spans_of(candidate, where)
        if spans not in answers:
            answers.append(spans)
    return answers


def spans_of(candidate: Mapping[str, Any], where: str) -> list[str]:
    """A number, else spans of text, else a date: day, month, year. ValueError names the row."""
    number = take(candidate, "number", (str, int, float), where)
    if number != "":
        return [str(number)]
    spans = take(candidate, "spans", (list, tuple), where)
    if spans:
        if not all(isinstance(span, str) for span in spans):
            raise ValueError(f"{where}: spans={list(spans)!r:.80} are no texts")
        return list(spans)
    date = take(candidate, "date", dict, where)
    return [" ".join(take(date, part, str, where) for part in ("day", "month", "year")).strip()]
