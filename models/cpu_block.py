"""A pre-norm block on a CPU in fp32, forward and backward pass written out.

The same numbers as `models.layers` gives, up to rounding, in fewer passes over memory: query and
key are rotated in place, as complex numbers; the gradient of a projection is written where it
belongs, not joined from parts; attention reads the projection itself; residuals are added within
the products. What is cheap is computed again and not kept.
Shapes: I inner width of the MLP; the rest as in `models.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention.interface import AttentionPlan
from models.attention.sdpa import BucketPlan
from models.linear import product, product_plus, weight_gradient


@dataclass(frozen=True, slots=True)
class Mixing:
    """What attention needs beside weights."""

    plan: BucketPlan
    turns: Tensor | None  # [T, 1, K / 2] complex: rotation of each row (`Rope.turns`)
    num_heads: int
    eps: float  # of the norm before it


def is_possible(plan: AttentionPlan, x: Tensor) -> TypeGuard[BucketPlan]:
    """Whether the functions of this file can take the place of the layers."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(plan, BucketPlan)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


def attention_half(x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing) -> Tensor:
    """`x + o_proj(sigmoid(gate) * attention(norm(x)))`, x [T, D]; weights of gqkv_proj, o_proj."""
    if torch.is_grad_enabled():
        return _Attention.apply(x, in_weight, out_weight, mixing)
    return _attention(x, in_weight, out_weight, mixing)[0]


def mlp_half(x: Tensor, in_weight: Tensor, out_weight: Tensor, eps: float) -> Tensor:
    """`x + down(silu(gate) * up)` of norm(x), x [T, D]; weights of gate_up_proj, down_proj."""
    if torch.is_grad_enabled():
        return _MLP.apply(x, in_weight, out_weight, eps)
    gate, up = product(x * _inverse_rms(x, eps), in_weight).chunk(2, dim=-1)  # [T, I]
    return product_plus(x, F.silu(gate).mul_(up), out_weight)


def _attention(
    x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing
) -> tuple[Tensor, ...]:
    """The result, and what the backward pass reads: 1 / rms, the projection, and of attention."""
    scale = _inverse_rms(x, mixing.eps)  # [T, 1]
    if mixing.turns is not None:
        in_weight = in_weight.index_select(0, _paired_rows(x.shape[1], mixing.num_heads)[0])
    gqkv = product(x * scale, in_weight)  # [T, 4 D]
    if mixing.turns is not None:
        _query_key(gqkv, mixing).mul_(mixing.turns)
    mixed, sums = mixing.plan.mix(_by_head(gqkv, mixing))
    gated = gqkv[:, : x.shape[1]].sigmoid().mul_(mixed.flatten(1))  # [T, D]
    return product_plus(x, gated, out_weight), scale, gqkv, mixed, *sums


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing
    ) -> Tensor:
        result, *kept = _attention(x, in_weight, out_weight, mixing)
        ctx.mixing = mixing
        ctx.save_for_backward(x, in_weight, out_weight, *kept)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, in_weight, out_weight, scale, gqkv, mixed, *sums = ctx.saved_tensors
        mixing, width = ctx.mixing, x.shape[1]
        needs_x, needs_in, needs_out, _ = ctx.needs_input_grad
        gate, was_mixed = gqkv[:, :width].sigmoid(), mixed.flatten(1)  # [T, D]
        grad_out = weight_gradient(grad, gate * was_mixed) if needs_out else None
        if not (needs_x or needs_in):
            return None, None, grad_out, None
        grad_gated = product(grad, out_weight.T)  # [T, D]
        grad_mixed = (grad_gated * gate).view_as(mixed)
        by_head = _by_head(gqkv, mixing)
        grad_gqkv = mixing.plan.mix_backward(grad_mixed, by_head, mixed, sums).flatten(1)  # [T, 4D]
        torch.ops.aten.sigmoid_backward.grad_input(
            grad_gated.mul_(was_mixed), gate, grad_input=grad_gqkv[:, :width]
        )
        paired = unpaired = None
        if mixing.turns is not None:
            _query_key(grad_gqkv, mixing).mul_(mixing.turns.conj())
            paired, unpaired = _paired_rows(width, mixing.num_heads)
        grad_in = grad_x = None
        if needs_in:
            grad_in = weight_gradient(grad_gqkv, x * scale)
            grad_in = grad_in if unpaired is None else grad_in.index_select(0, unpaired)
        if needs_x:
            rows = in_weight if paired is None else in_weight.index_select(0, paired)
            grad_x = _norm_backward(grad, product(grad_gqkv, rows.T), x, scale)
        return grad_x, grad_in, grad_out, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, in_weight: Tensor, out_weight: Tensor, eps: float
    ) -> Tensor:
        scale = _inverse_rms(x, eps)  # [T, 1]
        gate_up = product(x * scale, in_weight)  # [T, 2 I]
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)  # [T, I]
        ctx.save_for_backward(x, in_weight, out_weight, scale, gate_up, activated)
        return product_plus(x, activated * up, out_weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, in_weight, out_weight, scale, gate_up, activated = ctx.saved_tensors
        needs_x, needs_in, needs_out, _ = ctx.needs_input_grad
        gate, up = gate_up.chunk(2, dim=-1)
        grad_out = weight_gradient(grad, activated * up) if needs_out else None
        if not (needs_x or needs_in):
            return None, None, grad_out, None
        grad_inner = product(grad, out_weight.T)  # [T, I]
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_inner, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_gate)
        grad_in = weight_gradient(grad_gate_up, x * scale) if needs_in else None
        grad_x = None
        if needs_x:
            grad_x = _norm_backward(grad, product(grad_gate_up, in_weight.T), x, scale)
        return grad_x, grad_in, grad_out, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[T, D] -> [T, 1]."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[1]).add_(eps).rsqrt_()


def _norm_backward(grad: Tensor, grad_normed: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The gradient to x of `x + f(x * scale)`: `grad` through the first, and through the norm."""
    towards_x = torch.linalg.vecdot(grad_normed, x)[:, None]  # [T, 1]
    grad_x = torch.addcmul(grad, grad_normed, scale)
    return grad_x.addcmul_(x, towards_x.mul_(scale.pow(3)), value=-1 / x.shape[1])


def _by_head(gqkv: Tensor, mixing: Mixing) -> Tensor:
    """[T, 4 D] -> [T, 4, H, K]."""
    return gqkv.unflatten(1, (4, mixing.num_heads, -1))


def _query_key(gqkv: Tensor, mixing: Mixing) -> Tensor:
    """Query and key of [T, 4 D] as complex numbers, a view [T, 2 H, K / 2]."""
    width = gqkv.shape[1] // 4
    pairs = gqkv[:, width : 3 * width].unflatten(1, (2 * mixing.num_heads, -1, 2))
    return torch.view_as_complex(pairs)


@lru_cache(8)
def _paired_rows(width: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """The order of gqkv_proj's rows [4 D] that puts the two numbers which a rotation mixes, K / 2
    apart, side by side in query and key (products of the two stay as they are); and the way back.
    """
    rows = torch.arange(4 * width).view(4, num_heads, 2, -1)  # [4, H, 2, K / 2]
    gate, query, key, value = rows.unbind()
    paired = (each.transpose(1, 2).reshape(-1) for each in (query, key))
    order = torch.cat((gate.reshape(-1), *paired, value.reshape(-1)))
    return order, order.argsort()
