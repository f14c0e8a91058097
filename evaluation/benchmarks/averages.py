"""Figures of benchmarks whose verdicts are credits: over items, or over categories of them."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.benchmarks.protocol import Figures, Item, Verdict
from evaluation.scoring import (
    Tally,
    macro_average,
    macro_standard_error,
    mean,
    micro_average,
    standard_error,
)


def micro_figures(verdicts: Sequence[Verdict]) -> Figures:
    """Accuracy over items."""
    errors = {
        "acc": standard_error([verdict.correct for verdict in verdicts]),
        "invalid": standard_error([float(verdict.invalid) for verdict in verdicts]),
    }
    robust = {}
    if verdicts and all(verdict.robust is not None for verdict in verdicts):
        credits = [verdict.robust or 0.0 for verdict in verdicts]
        robust["acc_robust"] = mean(credits)
        errors["acc_robust"] = standard_error(credits)
    return Figures(micro_average(tally(verdicts)), robust, known(errors), problems(verdicts))


def macro_figures(items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
    """Accuracy per category, and the mean over categories."""
    strata: dict[str, list[Verdict]] = {}
    for item, verdict in zip(items, verdicts, strict=False):
        strata.setdefault(item.category or "", []).append(verdict)
    published = [[verdict.correct for verdict in each] for each in strata.values()]
    errors = {
        f"acc_{name}": standard_error(credits)
        for name, credits in zip(strata, published, strict=True)
    }
    errors["acc"] = macro_standard_error(published)
    robust: dict[str, float] = {}
    if verdicts and all(verdict.robust is not None for verdict in verdicts):
        credits = [[verdict.robust or 0.0 for verdict in each] for each in strata.values()]
        robust["acc_robust"] = mean([mean(each) for each in credits])
        errors["acc_robust"] = macro_standard_error(credits)
    averages = macro_average({name: tally(each) for name, each in strata.items()})
    return Figures(averages, robust, known(errors), problems(verdicts))


def tally(verdicts: Sequence[Verdict]) -> Tally:
    return Tally(
        tuple(verdict.correct for verdict in verdicts), sum(verdict.invalid for verdict in verdicts)
    )


def known(errors: dict[str, float | None]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if error is not None}


def problems(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """One line per kind of problem, with how often it came."""
    counts: dict[str, int] = {}
    for verdict in verdicts:
        if verdict.problem is not None:
            counts[verdict.problem] = counts.get(verdict.problem, 0) + 1
    return tuple(f"{count} answers: {kind}" for kind, count in counts.items())
