"""What a block on a CPU in fp32 computes between its products, each in one pass over memory.

Compiled by numba when this file is first imported, and cached, for the vectors of this processor.
A row is computed by itself and always in the same order: its bits depend neither on the number of
threads nor on where it lies. All tensors are contiguous. A kernel gets addresses, numbers, and the
first row and the end of those that it computes: handing over an address takes a tenth of the time
that an array takes. Shapes: I inner width of the MLP; the rest as in `models.layers`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, float32, int32, int64, njit, types
from numba.extending import intrinsic
from torch import Tensor

from models.cpu_threads import share_out

SOURCES = sorted(Path(__file__).parent.glob("cpu_*.py"))
SOURCE = "_" + hashlib.sha256(b"".join(each.read_bytes() for each in SOURCES)).hexdigest()[:8]
GRAIN = 1 << 17  # numbers that a thread is given at least, or handing out takes longer
F32, I32, I64 = np.float32, np.int32, np.int64
ZERO, ONE = F32(0), F32(1)
# e^x = 2^n e^r. Adding ROUNDER leaves the whole number n in the last bits; ln 2 is two numbers, so
# that r = x - n ln 2 loses nothing; e^r by its Taylor series, |r| < 0.35. Relative error < 1e-7.
LOG2_E, ROUNDER, ROUNDER_BITS = F32(math.log2(math.e)), F32(1.5 * 2**23), I32(0x4B400000)
LN2_HIGH = F32(0.693145751953125)  # its last bits are 0: n LN2_HIGH is exact
LN2_LOW = F32(math.log(2) - 0.693145751953125)
C2, C3, C4, C5, C6, C7 = (F32(1 / math.factorial(n)) for n in range(2, 8))
LEAST, LARGEST = F32(-104), F32(89)  # beyond these e^x is 0 and infinite

# Of LLVM's liberties those that keep NaN and infinity: a spike of the loss must stay visible.
EXACT, IN_ANY_ORDER = {"contract"}, {"contract", "reassoc", "nsz"}

Addresses = tuple[int, ...]
why_not_cached: list[str] = []  # of each kernel that had to be compiled without a cache


def kernel(num_tensors: int, *numbers: Any, fastmath: set[str]) -> Callable[[Any], Any]:
    """Compiles a function of so many addresses, numbers of these types, first row and end."""
    signature = (types.UniTuple(int64, num_tensors), types.Tuple(numbers), int64, int64)
    options = {"fastmath": fastmath, "error_model": "numpy", "nogil": True}

    def compiled(function: Any) -> Any:
        function.__qualname__ += SOURCE  # numba looks at the file of `function` alone
        try:
            return njit(signature, cache=True, **options)(function)
        except Exception as error:  # of any kind: there is no folder for a cache, or damage in it
            # If it is the function that is wrong, that is raised again here.
            why_not_cached.append(f"{type(error).__name__}: {error}".splitlines()[0])
            return njit(signature, **options)(function)

    return compiled


def instruction(function: Callable[..., Any]) -> Any:
    """For functions that give LLVM's code for a call; callers leave out `typing`."""
    return intrinsic(function)


@instruction
def _pointer(typing: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.voidptr(int64), code


@instruction
def _bits_of(typing: Any, number: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return int32(float32), code


@instruction
def _power_of_2(typing: Any, exponent: Any) -> Any:
    """Exponents from -126 to 127: they are written where a float has its exponent."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        biased = builder.add(values[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return float32(int32), code


@njit(forceinline=True)
def floats(address: int, shape: Any) -> Any:
    """The array that begins there."""
    return carray(_pointer(address), shape, F32)


@njit(forceinline=True)
def integers(address: int, shape: Any) -> Any:
    """The same of int64."""
    return carray(_pointer(address), shape, I64)


@njit(fastmath=EXACT, error_model="numpy", forceinline=True)
def exp(x: Any) -> Any:
    """For loops that are to become vectors, which calls of the library's own do not."""
    x = LARGEST if x > LARGEST else x
    x = LEAST if x < LEAST else x
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    series = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
    whole = I32(_bits_of(shifted) - ROUNDER_BITS)
    half = I32(whole >> I32(1))  # in two steps: 2^n alone may be out of range
    return series * _power_of_2(half) * _power_of_2(I32(whole - half))


@njit(fastmath=EXACT, error_model="numpy", forceinline=True)
def _sigmoid(x: Any) -> Any:
    return ONE / (ONE + exp(-x))


def norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` [T, D], and 1 / rms(x) [T]."""
    normed, scale = torch.empty_like(x), x.new_empty(len(x))
    _over_rows(_norm, x, (x, normed, scale), (x.shape[1], eps))
    return normed, scale


@kernel(3, int64, float32, fastmath=IN_ANY_ORDER)
def _norm(addresses: Addresses, numbers: tuple[int, float], first: int, end: int) -> None:
    width, eps = numbers
    x, normed = floats(addresses[0], (end, width)), floats(addresses[1], (end, width))
    scale = floats(addresses[2], (end,))
    for row in range(first, end):
        total = ZERO
        for i in range(width):
            total += x[row, i] * x[row, i]
        factor = ONE / F32(math.sqrt(total / F32(width) + eps))
        scale[row] = factor
        for i in range(width):
            normed[row, i] = x[row, i] * factor


def norm_backward(grad: Tensor, grad_normed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient to x of `x + f(norm(x))`, from `grad` of the sum; it overwrites `grad_normed`,
    that of `norm(x)`."""
    tensors = (grad, grad_normed, normed, scale)
    _over_rows(_norm_backward, normed, tensors, (normed.shape[1],))
    return grad_normed


@kernel(4, int64, fastmath=IN_ANY_ORDER)
def _norm_backward(addresses: Addresses, numbers: tuple[int], first: int, end: int) -> None:
    (width,) = numbers
    grad, into = floats(addresses[0], (end, width)), floats(addresses[1], (end, width))
    normed, scale = floats(addresses[2], (end, width)), floats(addresses[3], (end,))
    for row in range(first, end):
        along = ZERO
        for i in range(width):
            along += into[row, i] * normed[row, i]
        along /= F32(width)
        factor = scale[row]
        for i in range(width):
            into[row, i] = grad[row, i] + factor * (into[row, i] - normed[row, i] * along)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`: [T, 2 I] -> [T, I]."""
    inner = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _over_rows(_swiglu, gate_up, (gate_up, inner), (inner.shape[1],))
    return inner


@kernel(2, int64, fastmath=EXACT)
def _swiglu(addresses: Addresses, numbers: tuple[int], first: int, end: int) -> None:
    (width,) = numbers
    gate_up, inner = floats(addresses[0], (end, 2, width)), floats(addresses[1], (end, width))
    for row in range(first, end):
        for i in range(width):
            gate = gate_up[row, 0, i]
            inner[row, i] = gate * _sigmoid(gate) * gate_up[row, 1, i]


def swiglu_backward(gate_up: Tensor, grad_inner: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient to `gate_up`, and `swiglu(gate_up)`, which overwrites `grad_inner`."""
    grad = torch.empty_like(gate_up)
    _over_rows(_swiglu_backward, gate_up, (gate_up, grad_inner, grad), (grad_inner.shape[1],))
    return grad, grad_inner


@kernel(3, int64, fastmath=EXACT)
def _swiglu_backward(addresses: Addresses, numbers: tuple[int], first: int, end: int) -> None:
    (width,) = numbers
    gate_up, inner = floats(addresses[0], (end, 2, width)), floats(addresses[1], (end, width))
    into = floats(addresses[2], (end, 2, width))
    for row in range(first, end):
        for i in range(width):
            gate, up, grad = gate_up[row, 0, i], gate_up[row, 1, i], inner[row, i]
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            into[row, 0, i] = grad * up * (sigmoid + silu * (ONE - sigmoid))
            into[row, 1, i] = grad * silu
            inner[row, i] = silu * up


def gated(gqkv: Tensor, mixed: Tensor) -> Tensor:
    """`sigmoid(gate) * mixed`: [T, 4 D], [T, D] -> [T, D]."""
    result = torch.empty_like(mixed)
    _over_rows(_gated, gqkv, (gqkv, mixed, result), (mixed.shape[1],))
    return result


@kernel(3, int64, fastmath=EXACT)
def _gated(addresses: Addresses, numbers: tuple[int], first: int, end: int) -> None:
    (width,) = numbers
    gqkv, mixed = floats(addresses[0], (end, 4, width)), floats(addresses[1], (end, width))
    result = floats(addresses[2], (end, width))
    for row in range(first, end):
        for i in range(width):
            result[row, i] = _sigmoid(gqkv[row, 0, i]) * mixed[row, i]


def gated_backward(gqkv: Tensor, mixed: Tensor, grad: Tensor, grad_gqkv: Tensor) -> Tensor:
    """`gated(gqkv, mixed)`. Writes the gate's part of `grad_gqkv`; `grad`, the gradient to what is
    gated, becomes that to `mixed`."""
    result = torch.empty_like(mixed)
    tensors = (gqkv, mixed, grad, grad_gqkv, result)
    _over_rows(_gated_backward, gqkv, tensors, (mixed.shape[1],))
    return result


@kernel(5, int64, fastmath=EXACT)
def _gated_backward(addresses: Addresses, numbers: tuple[int], first: int, end: int) -> None:
    (width,) = numbers
    gqkv, mixed = floats(addresses[0], (end, 4, width)), floats(addresses[1], (end, width))
    grad, into = floats(addresses[2], (end, width)), floats(addresses[3], (end, 4, width))
    result = floats(addresses[4], (end, width))
    for row in range(first, end):
        for i in range(width):
            gate, value, given = _sigmoid(gqkv[row, 0, i]), mixed[row, i], grad[row, i]
            result[row, i] = gate * value
            into[row, 0, i] = given * value * gate * (ONE - gate)
            grad[row, i] = given * gate


def rotate(gqkv: Tensor, turns: tuple[Tensor, Tensor], *, back: bool = False) -> None:
    """Rotates query and key of [T, 4 D] in place, by `cos` and `sin` of a `Rope`, or back."""
    assert len(turns[0]) == len(gqkv)
    size, sign = turns[0].shape[-1], -1.0 if back else 1.0
    _over_rows(_rotate, gqkv, (gqkv, *turns), (sign, gqkv.shape[1] // (4 * size), size))


@kernel(3, float32, int64, int64, fastmath=EXACT)
def _rotate(addresses: Addresses, numbers: tuple[float, int, int], first: int, end: int) -> None:
    sign, num_heads, size = numbers
    gqkv = floats(addresses[0], (end, 4 * num_heads, 2, size // 2))
    cos = floats(addresses[1], (end, 2, size // 2))
    sin = floats(addresses[2], (end, 2, size // 2))
    for row in range(first, end):
        for head in range(num_heads, 3 * num_heads):
            for i in range(size // 2):
                one, other = gqkv[row, head, 0, i], gqkv[row, head, 1, i]
                cosine, sine = cos[row, 0, i], sign * sin[row, 1, i]
                gqkv[row, head, 0, i] = one * cosine - other * sine
                gqkv[row, head, 1, i] = other * cosine + one * sine


def _over_rows(
    function: Any, largest: Tensor, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]
) -> None:
    in_parts(function, tensors, numbers, len(largest), max_parts=largest.numel() // GRAIN)


def in_parts(
    function: Any,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    end: int,
    *,
    max_parts: int,
) -> None:
    """Calls a kernel for all before `end`; as torch has threads, in up to `max_parts` parts."""
    share_out(partial(_call, function, tensors, numbers), end, max_parts=max_parts)


def _call(
    function: Any, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], first: int, end: int
) -> None:
    """Has the tensors, not addresses alone: their memory stays until the kernel is done."""
    function(tuple([each.data_ptr() for each in tensors]), numbers, first, end)
