"""The oracle: one dense [T, T] mask, softmax written out. Slow, obviously right, for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import PackedLayout


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The mask of a whole packed row."""

    visible: Tensor  # [T, T] bool: token i sees token j

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", query, key) * query.shape[-1] ** -0.5
        scores = scores.float().masked_fill(~self.visible, float("-inf"))
        sees_something = self.visible.any(-1, keepdim=True)
        # Rows of padding see nothing: softmax over them would give NaN, also backward.
        weights = scores.masked_fill(~sees_something, 0.0).softmax(-1) * sees_something
        return torch.einsum("hij,jhk->ihk", weights.to(value.dtype), value)


class DenseAttention:
    """Any device and type; memory grows with T * T."""

    name = "dense"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> DensePlan:
        return DensePlan(prefix_lm_mask(layout, num_rows))


def prefix_lm_mask(layout: PackedLayout, num_rows: int) -> Tensor:
    """[T, T] bool: which token sees which, straight from the definition in `interface.py`."""
    device = layout.cu_seqlens.device
    token = torch.arange(num_rows, device=device)
    starts = layout.cu_seqlens[:-1]
    ends = layout.cu_seqlens[1:]
    is_member = (token[:, None] >= starts) & (token[:, None] < ends)  # [T, S]
    same_sequence = (is_member.float() @ is_member.float().T) > 0  # [T, T]
    position = token - (is_member * starts).sum(-1)
    prefix_len = (is_member * layout.prefix_lens).sum(-1)
    in_prefix = position < prefix_len
    both_in_prefix = in_prefix[:, None] & in_prefix
    not_later = position[:, None] >= position
    return same_sequence & (both_in_prefix | (not_later & ~in_prefix[:, None]))
