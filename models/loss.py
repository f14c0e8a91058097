"""Next-token loss over packed rows: chunked cross-entropy, and counts that can be added up.

The [T, V] logits never exist at once: rows are scored in chunks, and where a gradient is wanted it
is computed in the same pass, so that the logits need not be kept or made again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import IGNORE_LABEL, PackedLayout
from models.linear import product, weight_gradient

CHUNK_LOGITS = 1 << 22  # logits alive at a time (16 MiB in fp32)


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a step is measured by, as sums over tokens and sequences; divided only at the logger."""

    loss: Tensor  # [] fp32: cross-entropy in nats, summed over scored tokens
    correct_tokens: Tensor  # [] int64: scored tokens that are the argmax
    scored_tokens: Tensor  # [] int64
    correct_sequences: Tensor  # [] int64: sequences whose every scored token is the argmax
    scored_sequences: Tensor  # [] int64: sequences with a scored token

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums(
            self.loss + other.loss,
            self.correct_tokens + other.correct_tokens,
            self.scored_tokens + other.scored_tokens,
            self.correct_sequences + other.correct_sequences,
            self.scored_sequences + other.scored_sequences,
        )

    def detach(self) -> StepSums:
        """The same sums without their graph."""
        return StepSums(
            self.loss.detach(),
            self.correct_tokens,
            self.scored_tokens,
            self.correct_sequences,
            self.scored_sequences,
        )


def next_token_sums(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    layout: PackedLayout,
    *,
    num_scored: int,
) -> StepSums:
    """Cross-entropy of `hidden` [T, D] through the head [V, D] against `labels` [T].

    `num_scored` is how many labels differ from IGNORE_LABEL: the batch knows it, asking the device
    would wait for it. `loss` has a gradient to `hidden` and `head_weight`.
    """
    rows = torch.nonzero_static(labels != IGNORE_LABEL, size=num_scored).squeeze(1)  # [scored]
    scored_labels = labels.index_select(0, rows).long()
    if not torch.is_grad_enabled():  # an autograd function is not told, and would work for nothing
        hidden, head_weight = hidden.detach(), head_weight.detach()
    loss, is_correct = _ChunkedCrossEntropy.apply(
        hidden.index_select(0, rows), head_weight, scored_labels
    )
    num_slots = len(layout.prefix_lens)
    slot = torch.searchsorted(layout.cu_seqlens[1:], rows, right=True, out_int32=True).long()
    counts = torch.zeros(2, num_slots, dtype=torch.int64, device=hidden.device)
    counts[0].index_add_(0, slot, torch.ones_like(slot))
    counts[1].index_add_(0, slot, is_correct.long())
    has_scored = counts[0] > 0
    return StepSums(
        loss=loss,
        correct_tokens=is_correct.sum(),
        scored_tokens=counts[0].sum(),
        correct_sequences=(has_scored & (counts[0] == counts[1])).sum(),
        scored_sequences=has_scored.sum(),
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], labels [N]) -> (loss summed, argmax is label [N])."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        is_correct = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        chunk = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = product(hidden[part], weight).float()  # [chunk, V]
            wanted = labels[part, None]
            is_correct[part] = logits.argmax(-1) == labels[part]
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            loss += (log_normalizer - logits.gather(1, wanted)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax(logits) - one_hot(labels)
            error = logits.sub_(log_normalizer).exp_()
            error.scatter_add_(1, wanted, error.new_full((1, 1), -1.0).expand_as(wanted))
            error = error.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(error, weight.T)
            if grad_weight is not None:
                grad_weight += weight_gradient(error, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(is_correct)
        return loss, is_correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
