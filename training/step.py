"""One optimizer step: forward, loss and backward of each micro-batch, then the update.

Owns what happens between a global batch and new weights; which batches, and with which learning
rate, is the loop's business (`pretrain.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from models.batch import PackedBatch
from models.language_model import LanguageModel
from models.loss import StepSums, next_token_sums
from training.adam_atan2 import AdamATan2
from training.compiling import compile_error, compile_failures
from training.distributed import reshard, set_gradient_sync
from training.step_check import StepCheck

ROW_MULTIPLE = 16  # of the rows that are computed on a CPU; kernels like whole vectors


def train_step(
    model: LanguageModel,
    optimizer: AdamATan2,
    micro_batches: Sequence[PackedBatch],
    divisor: float,
    backprop_steps: int | None,
    check: StepCheck,
) -> StepSums:
    """One step on this rank's share of a global batch.

    `divisor`: scored tokens per rank, on average over ranks; one for all micro-batches, so that the
    step equals the unsplit one. BadStepError on all ranks, and no gradient is left, where `check`
    finds the step of any of them bad.
    """
    try:
        sums = accumulate_gradients(model, micro_batches, divisor, backprop_steps)
    except compile_failures() as error:
        raise compile_error(error) from error
    reshard(model)
    try:
        check.require_sound(sums, model.parameters(), micro_batches)
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return sums


def accumulate_gradients(
    model: LanguageModel,
    micro_batches: Sequence[PackedBatch],
    divisor: float,
    backprop_steps: int | None,
) -> StepSums:
    """Adds up sums and gradients; these travel between ranks with the last micro-batch only."""
    total: StepSums | None = None
    for number, given in enumerate(micro_batches, start=1):
        set_gradient_sync(model, number == len(micro_batches))
        batch = given if _needs_one_shape(model, given) else given.without_padding(ROW_MULTIPLE)
        hidden = model(batch.tokens, batch.positions, batch.layout, backprop_steps)
        sums = next_token_sums(
            hidden, model.lm_head.weight, batch.labels, batch.layout, num_scored=batch.num_scored
        )
        (sums.loss / divisor).backward()
        total = sums.detach() if total is None else total + sums.detach()
    assert total is not None, "a global batch has at least one micro-batch"
    return total


def _needs_one_shape(model: LanguageModel, batch: PackedBatch) -> bool:
    """Compiled code is made for rows of one length; on an accelerator padding costs little."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return is_compiled or batch.tokens.device.type != "cpu"
