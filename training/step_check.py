"""Whether a step may reach the weights: finite loss and gradients, and no spike of the loss.

Owns what is looked at and what is told of a bad step; what follows is the policy of `guards`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models.batch import PackedBatch
from models.loss import StepSums
from training.distributed import World
from training.host_state import local_part, num_copies

KEPT_LOSSES = 100  # steps that a loss is compared with
LEAST_LOSSES = 20  # before so many are known, none is a spike
SCALE_OF_MAD = 1.4826  # makes the median deviation of a normal distribution its standard deviation
LEAST_SCALE = 0.01  # of the median: where losses hardly differ, no step of theirs is a spike


class BadStepError(RuntimeError):
    """A step that must not reach the weights; the same on all ranks, before the optimizer's."""

    def __init__(
        self,
        reason: str,
        *,
        loss: float | None,
        grad_norm: float | None,
        examples: list[list[int]],
    ) -> None:
        super().__init__(reason)
        self.loss = loss  # mean per scored token; None: not finite
        self.grad_norm = grad_norm  # of the mean loss; None: not finite
        self.examples = examples  # of the epoch, of each rank


class LossHistory:
    """The losses of the last steps, and how far above them a loss lies."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses = list(losses)[-KEPT_LOSSES:]

    def add(self, loss: float) -> None:
        self.losses = [*self.losses, loss][-KEPT_LOSSES:]

    def score(self, loss: float) -> float:
        """Robust z-score: the distance to the median in robust standard deviations."""
        if len(self.losses) < LEAST_LOSSES:
            return 0.0
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(each - median) for each in self.losses)
        scale = max(SCALE_OF_MAD * deviation, LEAST_SCALE * abs(median), 1e-12)
        return (loss - median) / scale


class StepCheck:
    """Looks at each step between its backward pass and the update, with one wait for the device.

    `spike_score`: the robust z-score above which a loss is a spike; None: no loss is.
    """

    def __init__(
        self, world: World, spike_score: float | None = None, losses: Iterable[float] = ()
    ) -> None:
        self.world = world
        self.spike_score = spike_score
        self.history = LossHistory(losses)

    def require_sound(
        self, sums: StepSums, params: Iterable[Tensor], micro_batches: Sequence[PackedBatch]
    ) -> None:
        """BadStepError, on all ranks, for a step that is bad on any; every rank calls it.

        `params` have the gradients of all ranks, on this rank's shards.
        """
        found_grads = [param.grad for param in params if param.grad is not None]
        copies = num_copies(found_grads[0]) if found_grads else 1
        grads = [local_part(grad) for grad in found_grads]
        grads = [grad for grad in grads if grad.numel()]  # a small weight is not on every rank
        norms = torch._foreach_norm(grads) if grads else ()
        square = torch.stack([torch.zeros_like(sums.loss), *norms]).float().square().sum()
        found = torch.stack((sums.loss.float(), square))  # [2]
        is_finite = torch.isfinite(found)
        shares = torch.cat((found.where(is_finite, 0.0), (~is_finite).float()))
        # sync: a bad step must not reach the weights, and all ranks must see the same.
        loss, square_of_all, num_bad_losses, num_bad_grads = self.world.sum(shares).tolist()
        num_scored = micro_batches[-1].global_num_scored
        loss /= max(1, num_scored)
        # Ranks divide by their average share of the scored tokens, and gradients are summed.
        grad_norm = math.sqrt(square_of_all / copies) / self.world.size
        reason = ""
        if num_bad_losses:
            reason = f"the loss of {int(num_bad_losses)} of {self.world.size} ranks is not finite"
        elif num_bad_grads:
            reason = "the gradient is not finite, or its square is not"
        elif self.spike_score is not None and num_scored:
            reason = self._spike(loss)
        if reason:
            raise BadStepError(
                f"{reason}{self._bad_ranks(sums) if num_bad_losses else ''}",
                loss=None if num_bad_losses else loss,
                grad_norm=None if num_bad_grads else grad_norm,
                examples=self._examples_of_ranks(micro_batches),
            )

    def _spike(self, loss: float) -> str:
        """What makes this loss a spike; a loss that is none is remembered."""
        assert self.spike_score is not None
        score = self.history.score(loss)
        if score <= self.spike_score:
            self.history.add(loss)
            return ""
        return (
            f"the loss {loss:.4g} is {score:.1f} robust standard deviations above the median "
            f"{statistics.median(self.history.losses):.4g} of the last "
            f"{len(self.history.losses)} steps (guard.spike_score={self.spike_score:g})"
        )

    def _bad_ranks(self, sums: StepSums) -> str:
        """Which ranks have a loss that is not finite. Only asked once there is one."""
        losses = self._of_ranks(sums.loss.detach().cpu().reshape(1).double()).flatten().tolist()
        bad = [f"{rank}: {loss}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        return f" (rank {', '.join(bad)})"

    def _examples_of_ranks(self, micro_batches: Sequence[PackedBatch]) -> list[list[int]]:
        """The examples of each rank. Only asked once a step is bad."""
        indices = torch.cat([batch.indices for batch in micro_batches])
        indices = indices[indices >= 0]
        counts = self._of_ranks(torch.tensor([len(indices)])).flatten().tolist()
        padded = torch.full((max(counts),), -1, dtype=torch.int64)
        padded[: len(indices)] = indices
        rows = self._of_ranks(padded).tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    def _of_ranks(self, values: Tensor) -> Tensor:
        """The values [n] of every rank, [ranks, n]."""
        rows = torch.zeros(self.world.size, len(values), dtype=values.dtype)
        rows[self.world.rank] = values
        return self.world.sum(rows)
