"""What makes a step bad: a loss or a gradient that is not finite, on any rank, or a spike."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from net_cases import random_row
from run_cases import ALONE
from torch import Tensor

from models.batch import PackedBatch
from models.loss import StepSums
from training.distributed import World
from training.step_check import KEPT_LOSSES, LEAST_LOSSES, BadStepError, LossHistory, StepCheck


@dataclass
class Meeting:
    """Where the ranks of a process, one thread each, add up their values."""

    size: int
    shares: dict[int, Tensor] = field(default_factory=dict)
    num_sums: int = 0

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def sum(self, rank: int, values: Tensor) -> Tensor:
        self.shares[rank] = values
        self.barrier.wait(timeout=10)
        total = torch.stack([self.shares[each] for each in range(self.size)]).sum(0)
        self.num_sums += rank == 0
        self.barrier.wait(timeout=10)
        return total


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: Tensor) -> Tensor:
        return self.meeting.sum(self.rank, values)


def batch_of(examples: list[int]) -> PackedBatch:
    row = random_row([], [], num_padding=8)
    return PackedBatch(
        tokens=row.tokens.int(),
        labels=torch.full((8,), -100, dtype=torch.int32),
        positions=row.positions.int(),
        layout=row.layout,
        indices=torch.tensor([*examples, -1]),
        num_scored=0,
        global_num_scored=10,
        global_num_tokens=10,
        next_cursor=5,
    )


def check_step(
    check: StepCheck, loss: float, grads: list[float], examples: list[int]
) -> BadStepError | None:
    """What is found of a step of this loss, summed over tokens; None where it is sound."""
    param = torch.zeros(len(grads), requires_grad=True)
    param.grad = torch.tensor(grads)
    unreached = torch.zeros(3, requires_grad=True)
    zero = torch.tensor(0)
    sums = StepSums(torch.tensor(loss), zero, zero, zero, zero)
    try:
        check.require_sound(sums, [unreached, param], [batch_of(examples)])
    except BadStepError as error:
        return error
    return None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "grads", "told"),
    [
        (NAN, [1.0], r"loss of 1 of 1 ranks is not finite \(rank 0: nan\)"),
        (-INF, [NAN], r"loss of 1 of 1 ranks is not finite \(rank 0: -inf\)"),
        (20.0, [1.0, NAN], "gradient is not finite"),
        (20.0, [1.0, INF], "gradient is not finite"),
        (20.0, [1.0, 1e20], "or its square is not"),  # it would never leave the second moment
    ],
)
def test_what_is_not_finite_is_bad(loss: float, grads: list[float], told: str) -> None:
    found = check_step(StepCheck(ALONE), loss, grads, [7, 9])
    assert found is not None and re.search(told, str(found))
    assert found.examples == [[7, 9]]


def test_a_sound_step_passes_with_its_gradients_untouched() -> None:
    assert check_step(StepCheck(ALONE), 20.0, [3.0, -1e18, 0.0], [1]) is None
    assert check_step(StepCheck(ALONE), 20.0, [], [1]) is None


@pytest.mark.parametrize(
    ("losses", "grads", "told", "num_sums"),
    [
        ((20.0, 20.0), ([1.0], [1.0]), None, 1),
        ((20.0, NAN), ([1.0], [1.0]), "the loss of 1 of 2 ranks is not finite (rank 1: nan)", 4),
        ((20.0, 20.0), ([INF], [1.0]), "the gradient is not finite, or its square is not", 3),
    ],
)
def test_all_ranks_find_the_same_and_ask_once_unless_it_is_bad(
    losses: tuple[float, float],
    grads: tuple[list[float], list[float]],
    told: str | None,
    num_sums: int,
) -> None:
    meeting = Meeting(2)

    def look(rank: int) -> BadStepError | None:
        world = ThreadWorld(rank=rank, size=2, device=torch.device("cpu"), meeting=meeting)
        examples = [3, 5, 8] if rank else [4]
        return check_step(StepCheck(world), losses[rank], grads[rank], examples)

    with ThreadPoolExecutor(2) as ranks:
        found = list(ranks.map(look, range(2)))
    assert [each and str(each) for each in found] == [told, told]
    assert all(each is None or each.examples == [[4], [3, 5, 8]] for each in found)
    assert meeting.num_sums == num_sums


def test_a_loss_far_above_the_last_ones_is_a_spike_and_is_not_remembered() -> None:
    draw = random.Random(0)
    check = StepCheck(ALONE, spike_score=8)
    for step in range(300):
        loss = 100 * 0.99**step + 20 + draw.gauss(0, 1)  # falls as losses do at first
        assert check_step(check, loss, [3.0], [step]) is None, step
    before = list(check.history.losses)
    assert len(before) == KEPT_LOSSES
    found = check_step(check, 80.0, [3.0], [1, 2])
    assert found is not None
    assert "the loss 8 is" in str(found) and "guard.spike_score=8" in str(found)
    assert (found.loss, found.grad_norm) == (8.0, 3.0)
    assert check.history.losses == before
    assert check_step(check, 0.1, [3.0], [1]) is None, "a low loss is no spike"
    assert check_step(StepCheck(ALONE, None, before), 1e9, [3.0], [1]) is None


def test_the_score_is_the_distance_to_the_median_in_robust_deviations() -> None:
    losses = [1.0] * 10 + [2.0] * 10 + [3.0] * 10 + [1e6]  # median 2, median deviation 1
    assert LossHistory(losses).score(5.0) == pytest.approx(3 / 1.4826)
    assert LossHistory([2.0] * 30).score(2.1) == pytest.approx(5.0), "1% of the median at least"
    assert LossHistory(losses[: LEAST_LOSSES - 1]).score(1e9) == 0.0
