"""The product behind every linear map, and which CPU kernel computes it.

In fp32 torch hands `x @ weight.T` to MKL, which on some processors runs at less than half the speed
of oneDNN at equal precision (2-core AMD EPYC, one thread, [512, 64] x [64, 512]: 100 against 213
GFLOP/s). The two differ in the last bits, so the choice belongs to a run and is kept with it; it is
one setting of the process, as the number of threads is. Weights that stay as they are may be packed
once into the layout that oneDNN computes in, which wins most where there are few rows (one thread
of that EPYC, [32, 1024] x [1024, 4096]: 97 GFLOP/s packed, 74 not, MKL 60).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS = ("mkl", "onednn")
MIN_ROWS = 64  # below this the plain call is faster (a decoding step has few rows)
PROBE_ROWS, PROBE_ROUNDS, PROBE_S = 512, 3, 0.1  # at least so many rounds, and so long
PACKED_ROWS = 64  # what a packed layout is chosen for: answers that are decoded at a time
FEWER_ROWS = 16  # as at the end of a batch
WORTHWHILE = 1.15  # oneDNN must be this much faster to be chosen: a run keeps the choice
WORTH_PACKING = 1.05  # costs one pass over the weights

_chosen = "mkl"


def set_linear_kernel(name: str) -> None:
    """Chooses for the whole process; ValueError for a kernel that is not there."""
    global _chosen  # one setting of the process, see above
    if name not in KERNELS:
        raise ValueError(f"linear={name} is none of auto, {', '.join(KERNELS)}")
    if name == "onednn" and not torch.backends.mkldnn.is_available():
        raise ValueError("linear=onednn: this build of torch has no oneDNN; use linear=auto")
    _chosen = name


def pick_linear_kernel(device: torch.device, width: int) -> tuple[str, str]:
    """The faster kernel for matrices of that width here, by a probe of 0.1 s, and why."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return "mkl", "the choice is one of CPUs with oneDNN alone"
    x, weight = torch.ones(PROBE_ROWS, width), torch.ones(4 * width, width)
    plain_s, onednn_s = _fastest(lambda: F.linear(x, weight), lambda: _product(x, weight))
    name = "onednn" if plain_s > WORTHWHILE * onednn_s else "mkl"
    return name, f"oneDNN takes {onednn_s / plain_s:.2f} of MKL's time"


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: [T, in], [out, in] -> [T, out], with gradients."""
    if weight.is_mkldnn:
        return _packed_product(x, weight)
    if _uses_onednn(x):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def packed(weight: Tensor) -> Tensor:
    """`weight` [out, in] for `linear` alone: for oneDNN, opaque to all else, without gradients."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def packing_gain(width: int) -> float:
    """How many times faster products of few rows are with packed weights here; 0: impossible."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    many, few = torch.ones(PACKED_ROWS, width), torch.ones(FEWER_ROWS, width)
    weight = torch.ones(4 * width, width)
    in_layout = packed(weight)
    many_s, few_s, packed_many_s, packed_few_s = _fastest(
        lambda: linear(many, weight),
        lambda: linear(few, weight),
        lambda: linear(many, in_layout),
        lambda: linear(few, in_layout),
    )
    return (many_s / packed_many_s * few_s / packed_few_s) ** 0.5


def product(x: Tensor, weight: Tensor) -> Tensor:
    """The same without gradients, for code that writes its own."""
    return _product(x, weight) if _uses_onednn(x) else F.linear(x, weight)


def product_plus(added: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`added + x @ weight.T`, without gradients."""
    if _uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, None, "add")
    return torch.addmm(added, x, weight.T)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x`: the gradient to a weight from that of its product, [T, out] and [T, in]."""
    if not _uses_onednn(grad):
        return grad.T @ x
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.T, x.T)
    return _product(x.T, grad.T).T.contiguous()  # it copies its first factor: the smaller one


def _uses_onednn(x: Tensor) -> bool:
    is_plain_matrix = x.dim() == 2 and len(x) >= MIN_ROWS
    return (
        _chosen == "onednn"
        and is_plain_matrix
        and x.dtype == torch.float32
        and x.device.type == "cpu"
    )


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # inductor has no code of its own for it
        return _product_whole(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.custom_op("recurrent_lm::onednn_product", mutates_args=())
def _product_whole(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@_product_whole.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


class _Linear(torch.autograd.Function):
    """oneDNN's product, and its two gradients by the same kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _fastest(*calls: Callable[[], Tensor]) -> list[float]:
    """Seconds of the fastest try of each, taken in turn: what slows one down slows all down."""
    best_s = [float("inf")] * len(calls)
    ends_at = time.monotonic() + PROBE_S
    rounds = 0
    while rounds < PROBE_ROUNDS or time.monotonic() < ends_at:
        rounds += 1
        for number, call in enumerate(calls):
            started_at = time.perf_counter()
            call()
            best_s[number] = min(best_s[number], time.perf_counter() - started_at)
    return best_s
