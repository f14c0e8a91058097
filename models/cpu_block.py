"""A pre-norm block on a CPU in fp32, forward and backward pass written out.

The same numbers as `models.layers` gives, up to rounding, in fewer passes over memory: what lies
between two products is one compiled kernel (`models.cpu_kernels`); the gradient of a projection is
written where it belongs, not joined from parts; attention reads the projection itself; residuals
are added within the products. What is cheap is computed again and not kept.
Shapes: I inner width of the MLP; the rest as in `models.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention.interface import AttentionPlan
from models.attention.sdpa import BucketPlan
from models.linear import product, product_plus, weight_gradient


@dataclass(frozen=True, slots=True)
class Mixing:
    """What attention needs beside weights."""

    plan: BucketPlan
    turns: tuple[Tensor, Tensor] | None  # `cos` and `sin` of a `Rope`
    num_heads: int
    eps: float  # of the norm before it


def is_possible(plan: AttentionPlan, x: Tensor) -> TypeGuard[BucketPlan]:
    """Whether the functions of this file can take the place of the layers."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(plan, BucketPlan)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and why_no_kernels() is None
    )


@lru_cache(1)
def why_no_kernels() -> str | None:
    """Why `models.cpu_kernels` cannot be used here, or None; the first call compiles them."""
    try:
        from numba import config

        import models.cpu_attention  # noqa: F401
    except ImportError as error:
        return str(error)
    is_off = config.DISABLE_JIT  # type: ignore[attr-defined]  # made from the environment
    return "NUMBA_DISABLE_JIT is set" if is_off else None


def attention_half(x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing) -> Tensor:
    """`x + o_proj(sigmoid(gate) * attention(norm(x)))`, x [T, D]; weights of gqkv_proj, o_proj."""
    if torch.is_grad_enabled():
        return _Attention.apply(x, in_weight, out_weight, mixing)
    return _attention(x, in_weight, out_weight, mixing)[0]


def mlp_half(x: Tensor, in_weight: Tensor, out_weight: Tensor, eps: float) -> Tensor:
    """`x + down(silu(gate) * up)` of norm(x), x [T, D]; weights of gate_up_proj, down_proj."""
    if torch.is_grad_enabled():
        return _MLP.apply(x, in_weight, out_weight, eps)
    return _mlp(x, in_weight, out_weight, eps)[0]


def _attention(
    x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing
) -> tuple[Tensor, ...]:
    """The result, and what the backward pass reads: the norm, the projection, and of attention."""
    from models import cpu_kernels

    normed, scale = cpu_kernels.norm(x.contiguous(), mixing.eps)  # [T, D], [T]
    gqkv = product(normed, in_weight)  # [T, 4 D]
    if mixing.turns is not None:
        cpu_kernels.rotate(gqkv, mixing.turns)
    mixed, kept = mixing.plan.mix(_by_head(gqkv, mixing))
    result = product_plus(x, cpu_kernels.gated(gqkv, mixed.flatten(1)), out_weight)
    return result, normed, scale, gqkv, mixed, *kept


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, in_weight: Tensor, out_weight: Tensor, mixing: Mixing
    ) -> Tensor:
        result, *kept = _attention(x, in_weight, out_weight, mixing)
        ctx.mixing = mixing
        ctx.save_for_backward(in_weight, out_weight, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from models import cpu_kernels

        in_weight, out_weight, normed, scale, gqkv, mixed, *kept = ctx.saved_tensors
        mixing, grad = ctx.mixing, grad.contiguous()
        needs_x, needs_in, needs_out, _ = ctx.needs_input_grad
        grad_gqkv = torch.empty_like(gqkv)
        grad_mixed = product(grad, out_weight.T)  # [T, D]; as yet of what is gated
        was_gated = cpu_kernels.gated_backward(gqkv, mixed.flatten(1), grad_mixed, grad_gqkv)
        grad_out = weight_gradient(grad, was_gated) if needs_out else None
        grad_in = grad_x = None
        if needs_x or needs_in:
            given, into = _by_head(gqkv, mixing), _by_head(grad_gqkv, mixing)
            mixing.plan.mix_backward(grad_mixed.view_as(mixed), given, mixed, kept, into)
            if mixing.turns is not None:
                cpu_kernels.rotate(grad_gqkv, mixing.turns, back=True)
        if needs_in:
            grad_in = weight_gradient(grad_gqkv, normed)
        if needs_x:
            grad_normed = product(grad_gqkv, in_weight.T)
            grad_x = cpu_kernels.norm_backward(grad, grad_normed, normed, scale)
        return grad_x, grad_in, grad_out, None


def _mlp(x: Tensor, in_weight: Tensor, out_weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The result, and what the backward pass reads: the norm, and gate and up."""
    from models import cpu_kernels

    normed, scale = cpu_kernels.norm(x.contiguous(), eps)  # [T, D], [T]
    gate_up = product(normed, in_weight)  # [T, 2 I]
    return product_plus(x, cpu_kernels.swiglu(gate_up), out_weight), normed, scale, gate_up


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, in_weight: Tensor, out_weight: Tensor, eps: float
    ) -> Tensor:
        result, *kept = _mlp(x, in_weight, out_weight, eps)
        ctx.save_for_backward(in_weight, out_weight, *kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from models import cpu_kernels

        in_weight, out_weight, normed, scale, gate_up = ctx.saved_tensors
        needs_x, needs_in, needs_out, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_gate_up, inner = cpu_kernels.swiglu_backward(gate_up, product(grad, out_weight.T))
        grad_out = weight_gradient(grad, inner) if needs_out else None
        grad_in = weight_gradient(grad_gate_up, normed) if needs_in else None
        grad_x = None
        if needs_x:
            grad_normed = product(grad_gate_up, in_weight.T)
            grad_x = cpu_kernels.norm_backward(grad, grad_normed, normed, scale)
        return grad_x, grad_in, grad_out, None


def _by_head(gqkv: Tensor, mixing: Mixing) -> Tensor:
    """[T, 4 D] -> [T, 4, H, K]."""
    return gqkv.unflatten(1, (4, mixing.num_heads, -1))
