"""MATH: competition problems; answers are compared as formulas by math_verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from evaluation.benchmarks.averages import micro_figures
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Figures,
    Item,
    Loaded,
    Split,
    Verdict,
    take,
)
from evaluation.scoring import last_box
from evaluation.verifier import OWN_LIMIT, VerifierStoppedError, shared_verifier

DATASET = "EleutherAI/hendrycks_math"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class MATH(Benchmark):
    """The problem alone; the last box of the answer, else all of it, is verified."""

    split: str = "test"

    name: ClassVar[str] = "MATH"
    robust_rule: ClassVar[str | None] = (
        "box and truth are compared as plain spelling, then as formulas between dollars "
        "(published: without, so sets, intervals, \\dfrac, polynomials and text are wrong even "
        "against themselves, and 3! equals 3)"
    )

    def splits(self) -> list[Split]:
        return [Split(DATASET, self.split, subject) for subject in SUBJECTS]

    def load(self, source: DataSource) -> Loaded:
        items = []
        for split in self.splits():
            for index, row in enumerate(source.rows(split, benchmark=self.name)):
                where = f"{split} row {index}"
                solution = take(row, "solution", str, where)
                truth = last_box(solution)
                if truth is None:
                    raise ValueError(f"{where}: its solution has no \\boxed{{...}}")
                problem = take(row, "problem", str, where)
                item_id = f"{split.config}/{self.split}/{index}"
                items.append(Item(item_id, problem, truth, category=split.config))
        return Loaded(items)

    def judge(self, item: Item, answer: str) -> Verdict:
        boxed = last_box(answer)
        try:
            reply = shared_verifier().ask("math", gold=item.truth, answer=answer, boxed=boxed)
        except VerifierStoppedError as stopped:
            return Verdict(boxed, 0.0, boxed is None, robust=0.0, problem=str(stopped))
        return Verdict(
            extracted=boxed,
            correct=float(reply["correct"]),
            invalid=boxed is None,
            robust=float(reply["robust"]),
            problem=OWN_LIMIT if reply["timed_out"] else None,
            detail={"parsed": reply["parsed"], "gold_parsed": reply["gold_parsed"]},
        )

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        return micro_figures(verdicts)
