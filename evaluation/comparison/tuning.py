"""The learning rate of each net, chosen on validation items and never on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.comparison.plan import Planned
from evaluation.comparison.runs import Bench


@dataclass(frozen=True, slots=True)
class ChosenLR:
    """A learning rate and how it was come by."""

    lr: float
    tried: Mapping[float, float]  # exact accuracy on validation by lr; empty: nothing to choose
    note: str


def choose_lr(bench: Bench, planned: Planned, lrs: Sequence[float], seed: int) -> ChosenLR:
    """The best of `lrs` by one run each; the grid grows once where the best is at its edge.

    Among equals the smallest is taken, and the note tells of them.
    """
    if planned.fixed_lr is not None:
        return ChosenLR(planned.fixed_lr, {}, "given")
    if len(lrs) == 1:
        return ChosenLR(lrs[0], {}, "the only one")
    tried = {lr: validation_accuracy(bench, planned, lr, seed) for lr in sorted(lrs)}
    beyond = lr_beyond(tried)
    if beyond is not None:
        tried[beyond] = validation_accuracy(bench, planned, beyond, seed)
    return settled(tried)


def validation_accuracy(bench: Bench, planned: Planned, lr: float, seed: int) -> float:
    """The mean over tasks after the last step."""
    answers = bench.run(planned, lr, seed).answers("validation", planned.steps)
    mean = sum(sum(right) / len(right) for right in answers.values()) / len(answers)
    return round(mean, 6)  # so that ties are ties


def best_lrs(tried: Mapping[float, float]) -> list[float]:
    """All that reach the highest accuracy, ascending."""
    highest = max(tried.values())
    return sorted(lr for lr, accuracy in tried.items() if accuracy == highest)


def lr_beyond(tried: Mapping[float, float]) -> float | None:
    """The next learning rate beyond the edge of the grid that the best one lies at, if it does."""
    grid, best = sorted(tried), best_lrs(tried)[0]
    if best == grid[-1]:
        return float(f"{best * grid[-1] / grid[-2]:.3g}")
    if best == grid[0]:
        return float(f"{best * grid[0] / grid[1]:.3g}")
    return None


def settled(tried: Mapping[float, float]) -> ChosenLR:
    """The best of what was tried, with what a reader should know about it."""
    grid, best = sorted(tried), best_lrs(tried)
    notes = [f"tie of {', '.join(f'{lr:g}' for lr in best)}"] if len(best) > 1 else []
    if best[0] in (grid[0], grid[-1]):
        notes.append("at the edge of the grid")
    return ChosenLR(best[0], dict(sorted(tried.items())), "; ".join(notes))
