"""What Triton kernels do with rows of heads: read and write them, rotate them and back.

Needs triton on import: import it in the function that launches.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor [T, H, K] whose last stride is 1."""

    data: Any
    row_stride: Any
    head_stride: Any


@triton.jit
def load(rows, first, stop, head, SIZE: tl.constexpr, HEAD: tl.constexpr, COUNT: tl.constexpr):
    """[COUNT, HEAD]: rows from `first` on; zero from `stop` on and beyond the head's SIZE."""
    row, column = tl.arange(0, COUNT), tl.arange(0, HEAD)
    base = rows.data + tl.cast(first, tl.int64) * rows.row_stride + head * rows.head_stride
    is_inside = (first + row < stop)[:, None]
    if SIZE != HEAD:
        is_inside = is_inside & (column < SIZE)[None, :]
    return tl.load(base + row[:, None] * rows.row_stride + column, mask=is_inside, other=0.0)


@triton.jit
def store(
    rows, values, first, stop, head, SIZE: tl.constexpr, HEAD: tl.constexpr, COUNT: tl.constexpr
):
    """What `load` reads, written; nothing from `stop` on."""
    row, column = tl.arange(0, COUNT), tl.arange(0, HEAD)
    base = rows.data + tl.cast(first, tl.int64) * rows.row_stride + head * rows.head_stride
    is_inside = (first + row < stop)[:, None]
    if SIZE != HEAD:
        is_inside = is_inside & (column < SIZE)[None, :]
    values = values.to(rows.data.dtype.element_ty)
    tl.store(base + row[:, None] * rows.row_stride + column, values, mask=is_inside)


@triton.jit
def _halves_swapped(x, HEAD: tl.constexpr, COUNT: tl.constexpr):
    """fp32 [COUNT, HEAD] with the halves of each head exchanged."""
    halves = tl.permute(tl.reshape(x, (COUNT, 2, HEAD // 2)), (0, 2, 1))
    first, second = tl.split(halves)
    return tl.reshape(tl.permute(tl.join(second, first), (0, 2, 1)), (COUNT, HEAD))


@triton.jit
def rotated_back(grad, cos, sin, first, stop, HEAD: tl.constexpr, COUNT: tl.constexpr):
    """The gradient of what was rotated, from that of the result."""
    c = load(cos, first, stop, 0, HEAD, HEAD, COUNT)
    s = load(sin, first, stop, 0, HEAD, HEAD, COUNT)
    return grad * c + _halves_swapped(grad * s, HEAD, COUNT)


@triton.jit
def rotate_kernel(
    query, key, cos, sin, rotated_query, rotated_key, num_rows,
    HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`Rope.rotate` of ROWS rows of one head."""
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    c = load(cos, first, num_rows, 0, HEAD, HEAD, ROWS)
    s = load(sin, first, num_rows, 0, HEAD, HEAD, ROWS)
    q = load(query, first, num_rows, head, HEAD, HEAD, ROWS).to(tl.float32)
    q = q * c + _halves_swapped(q, HEAD, ROWS) * s
    store(rotated_query, q, first, num_rows, head, HEAD, HEAD, ROWS)
    k = load(key, first, num_rows, head, HEAD, HEAD, ROWS).to(tl.float32)
    k = k * c + _halves_swapped(k, HEAD, ROWS) * s
    store(rotated_key, k, first, num_rows, head, HEAD, HEAD, ROWS)
