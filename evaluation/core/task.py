"""A task of CORE as a benchmark: rows asked by the mean loss of spans, not by generated text.

An answer is what `evaluation.core.engine` measured, as JSON: the mean token loss of each option (in
nats; null where the context has no room), or of language modelling whether all tokens were the
likeliest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from evaluation.benchmarks.averages import known, tally
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Figures,
    Item,
    Loaded,
    Split,
    Verdict,
)
from evaluation.core.bundle import Bundle, TaskEntry
from evaluation.core.prompts import RenderedRow, in_core_order, rendered
from evaluation.scoring import mean, micro_average, standard_error
from inference.requests import Score

ALL_GREEDY, NOT_GREEDY = "likeliest", "another"


class CoreTask(Benchmark):
    """One task of a bundle."""

    task: TaskEntry
    baseline: float  # per cent
    max_per_task: PositiveInt | None = None
    bundle: Path = Field(exclude=True)  # where it lies makes no difference

    name: ClassVar[str] = "CORE"

    def splits(self) -> list[Split]:
        return []

    def rows(self) -> list[RenderedRow]:
        """In the order in which they are asked."""
        bundle = Bundle.open(self.bundle)
        examples = in_core_order(bundle.examples(self.task), self.max_per_task)
        return list(rendered(examples, self.task))

    def digest(self) -> str:
        """Of all that decides the rows."""
        return Bundle.open(self.bundle).digest(self.task)

    def load(self, source: DataSource) -> Loaded:
        """Reads the bundle; `source` is not asked."""
        items = []
        for index, row in enumerate(self.rows()):
            is_text = row.kind == "language_modeling"
            truth = ALL_GREEDY if is_text else row.example.gold
            items.append(Item(f"{self.task.label}/{index}", row.shown, truth))
        return Loaded(items)

    def judge(self, item: Item, answer: str) -> Verdict:
        measured = json.loads(answer) if answer else {}
        losses = measured.get("losses") or [None]
        fitting = [loss for loss in losses if loss is not None]
        chosen: str | int | None = None
        if fitting and "is_greedy" in measured:
            chosen = ALL_GREEDY if measured["is_greedy"] else NOT_GREEDY
        elif fitting:
            chosen = losses.index(min(fitting))
        return Verdict(
            extracted=chosen,
            correct=float(chosen is not None and chosen == item.truth),
            invalid=len(fitting) < len(losses),
        )

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return centred_figures(verdicts, self.baseline / 100)

    def chance(self, items: Sequence[Item]) -> float | None:
        return self.baseline / 100


def measured(scores: Sequence[Score | None], *, is_text: bool) -> str:
    """The answer to a row: of each option the score of its span, None where it did not fit."""
    losses = [_mean_loss(score) for score in scores]
    found: dict[str, Any] = {"losses": losses}
    if is_text and scores[0] is not None:
        found["is_greedy"] = scores[0].is_greedy
    return json.dumps(found)


def _mean_loss(score: Score | None) -> float | None:
    if score is None or score.is_too_long:
        return None
    loss = -score.total / len(score.logprobs)
    return loss if isfinite(loss) else None


def centred(accuracy: float, chance: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - chance) / (1 - chance)


def centred_figures(verdicts: Sequence[Verdict], chance: float) -> Figures:
    """`n`, `acc`, `invalid`, and `centred`; `acc_robust` where every verdict has such a credit."""
    average = micro_average(tally(verdicts))
    error = standard_error([verdict.correct for verdict in verdicts])
    errors = {"acc": error, "centred": None if error is None else error / (1 - chance)}
    published = {**average, "centred": centred(average["acc"], chance)}
    credits = [verdict.robust for verdict in verdicts if verdict.robust is not None]
    robust = {}
    if credits and len(credits) == len(verdicts):
        robust["acc_robust"] = mean(credits)
        errors["acc_robust"] = standard_error(credits)
    return Figures(published, robust, known(errors))


def mean_centred(records: Mapping[str, Mapping[str, Any]]) -> tuple[float, float | None]:
    """The mean of `centred` over recorded benchmarks, and its standard error."""
    values = [record["published"]["centred"] for record in records.values()]
    errors = [record["standard_errors"].get("centred") for record in records.values()]
    squares = [error**2 for error in errors if error is not None]
    whole = len(squares) == len(values)
    return mean(values), sum(squares) ** 0.5 / len(values) if whole else None
