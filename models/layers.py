"""The layers of every net: linear maps, embedding, rotary positions, attention, SwiGLU.

Owns their formulas and their initialisation; which kernel computes the attention is not known here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.interface import FusedContext
from models.linear import linear

# A normal folded by fmod(3) has the standard deviation 1 / this.
TRUNCATED_NORMAL_SCALE = 1.014762601732121


def truncated_normal(*shape: int, std: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of standard deviation `std`; those beyond 3 sigma wrap around to near zero."""
    return torch.randn(shape, dtype=dtype).fmod_(3.0).mul_(TRUNCATED_NORMAL_SCALE * std)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`x / rms(x)` over the last dimension, without a learned weight; computed in fp32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class Linear(nn.Module):
    """`x @ weight.T`, [..., in] -> [..., out]; no bias anywhere in these nets."""

    def __init__(self, in_features: int, out_features: int, *, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal(out_features, in_features, std=std))

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        """`call`: which call of its stack this is; adapters may have weights for each."""
        return linear(x, self.weight)


class ScaledEmbedding(nn.Module):
    """Token embedding of standard deviation `std`, multiplied by 1 / std after the look-up."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal(vocab_size, hidden_size, std=std))
        self.scale = 1.0 / std

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) * self.scale


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (arXiv 2104.09864), "rotate half" convention, for the rows of one batch."""

    cos: Tensor  # [T, 1, 1, K] fp32
    sin: Tensor  # [T, 1, 1, K] fp32; the first half negated, so that rotating is one roll

    @classmethod
    def at(cls, positions: Tensor, head_size: int, theta: float) -> Rope:
        """The rotation of each of `positions` [T], in fp32 whatever the compute type is."""
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / (theta ** (exponents / head_size))
        angles = positions.float()[:, None] * frequencies  # [T, K / 2]
        cos, sin = angles.cos(), angles.sin()
        return cls(
            cos=torch.cat((cos, cos), -1)[:, None, None],
            sin=torch.cat((-sin, sin), -1)[:, None, None],
        )

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates `x` [T, N, H, K]."""
        halves_swapped = x.roll(x.shape[-1] // 2, -1)
        return (x * self.cos + halves_swapped * self.sin).to(x.dtype)


class AttentionContext(Protocol):
    """What one application of a stack attends to: the packed row, or a cache too."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixes values for the layer of that index; all [T, H, K]."""
        ...


class GatedAttention(nn.Module):
    """Multi-head attention whose output is gated by a sigmoid of its input."""

    def __init__(self, hidden_size: int, num_heads: int, *, in_std: float, out_std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gqkv_proj = Linear(hidden_size, 4 * hidden_size, std=in_std)
        self.o_proj = Linear(hidden_size, hidden_size, std=out_std)

    def forward(
        self, x: Tensor, rope: Rope | None, context: AttentionContext, layer: int, call: int = 0
    ) -> Tensor:
        gqkv = self.gqkv_proj(x, call).unflatten(-1, (4, self.num_heads, -1))  # [T, 4, H, K]
        if isinstance(context, FusedContext):
            angles = (None, None) if rope is None else (rope.cos, rope.sin)
            gated = context.plan.attend_gated(gqkv, *angles)  # [T, H, K]
            return self.o_proj(gated.flatten(-2), call)  # [T, D]
        gate, query_key, value = gqkv.split((1, 2, 1), dim=-3)  # [T, 1 | 2 | 1, H, K]
        if rope is not None:
            query_key = rope.rotate(query_key)
        query, key = query_key.unbind(-3)  # [T, H, K]
        mixed = context.attend(layer, query, key, value.squeeze(-3))  # [T, H, K]
        return self.o_proj((gate.squeeze(-3).sigmoid() * mixed).flatten(-2), call)  # [T, D]


class SwiGLU(nn.Module):
    """`down(silu(gate) * up)` (arXiv 2002.05202), gate and up in one projection."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, in_std: float, out_std: float
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, std=in_std)
        self.down_proj = Linear(intermediate_size, hidden_size, std=out_std)

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        gate, up = self.gate_up_proj(x, call).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, call)


def swiglu_size(hidden_size: int, expansion: float) -> int:
    """Inner width with about the parameters of a plain MLP, rounded up to a multiple of 256."""
    return math.ceil(round(expansion * hidden_size * 2 / 3) / 256) * 256
