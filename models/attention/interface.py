"""What an attention backend is.

PrefixLM attention over packed sequences: token i of a sequence with prefix length P sees tokens
j < P when i < P, and j <= i otherwise; nothing outside its sequence. Rows of padding give zeros
and get zero gradients. The scale is K^-0.5.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.batch import PackedLayout


class AttentionPlan(Protocol):
    """What is computed once per batch (masks, buckets, gathers) and used by every layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H, K] each -> [T, H, K]."""
        ...


class AttentionBackend(Protocol):
    """One way to compute PrefixLM attention."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """The reason why it cannot run there, or None."""
        ...

    def prepare(self, layout: PackedLayout, num_rows: int) -> AttentionPlan:
        """The plan for one packed row of `num_rows` = T tokens, padding included."""
        ...
