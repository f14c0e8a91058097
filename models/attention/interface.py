"""What an attention backend is.

PrefixLM attention over packed sequences: token i of a sequence with prefix length P sees tokens
j < P when i < P, and j <= i otherwise; nothing outside its sequence. Rows of padding give zeros
and get zero gradients. The scale is K^-0.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.batch import PackedLayout


class AttentionPlan(Protocol):
    """What is computed once per batch (masks, buckets, gathers) and used by every layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, H, K] each -> [T, H, K]."""
        ...


class GatedPlan(AttentionPlan, Protocol):
    """A plan whose kernels also rotate queries and keys, and gate the result."""

    def attend_gated(self, gqkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Gate, query, key and value [T, 4, H, K] -> [T, H, K]; `cos` and `sin` as in `Rope`."""
        ...


@dataclass(frozen=True, slots=True)
class PackedContext:
    """Attention within one packed row, the same for every layer and application."""

    plan: AttentionPlan

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.plan.attend(query, key, value)


@dataclass(frozen=True, slots=True)
class FusedContext:
    """The same where the plan rotates and gates for the layers."""

    plan: GatedPlan

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.plan.attend(query, key, value)


class AttentionBackend(Protocol):
    """One way to compute PrefixLM attention."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """The reason why it cannot run there, or None."""
        ...

    def prepare(self, layout: PackedLayout, num_rows: int) -> AttentionPlan:
        """The plan for one packed row of `num_rows` = T tokens, padding included."""
        ...
