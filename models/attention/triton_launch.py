"""Launches the Triton kernels of attention in one pass, with blocks that fit the heads.

Tensors in, tensors out: autograd and compiled code see the operators of `one_pass.py` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # needs triton on import
    from models.attention.triton_rows import Rows

TILE_ROWS = 128
SMALLEST_PRODUCT = 16  # rows and columns that Triton multiplies; smaller heads are filled up
ROTATED_ROWS = 32  # at a time


@dataclass(frozen=True, slots=True)
class Blocks:
    """What one program works on, and how. Rows divide TILE_ROWS."""

    rows: int
    others: int  # keys (of the rows' queries) or queries (of the rows' keys) at a time
    num_warps: int
    num_stages: int = 2


@dataclass(frozen=True, slots=True)
class Inputs:
    """What attends, [T, H, K] each, the gate of the result, if any, and the tiles of the row."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """`Rope`, [T, 1, 1, K] each."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Mixed:
    """What the forward kernel writes."""

    values: Tensor  # [T, H, K]
    gated: Tensor | None  # the same, gated
    sums: Tensor  # [H, T] fp32: log-sum-exp of the scores, in powers of two


def blocks_of(head_size: int, element_bytes: int, *, is_backward: bool) -> Blocks:
    """Few enough registers that next to none are spilled, and at most 99 KiB of shared memory
    where a GPU has no more: found by compiling for compute capabilities 8.0 to 12.0, not by time.
    """
    head = filled(head_size)
    if element_bytes == 4:
        if head <= 64:
            return Blocks(32, 32, num_warps=4) if is_backward else Blocks(64, 32, num_warps=4)
        return Blocks(16, 16, num_warps=4, num_stages=1 if head > 128 else 2)
    if head <= 64:
        return Blocks(64, 64, num_warps=4)
    if head <= 128:
        return Blocks(64, 32 if is_backward else 64, num_warps=4)
    return Blocks(32 if is_backward else 64, 32, num_warps=8)


def filled(head_size: int) -> int:
    """The power of two that a head is filled up to."""
    return max(SMALLEST_PRODUCT, 1 << (head_size - 1).bit_length())


def constants_of(head_size: int, blocks: Blocks) -> dict[str, int]:
    """The kernels' arguments that they are compiled for."""
    return {
        "SIZE": head_size,
        "HEAD": filled(head_size),
        "ROWS": blocks.rows,
        "BLOCK": blocks.others,
        "PARTS": TILE_ROWS // blocks.rows,
    }


def rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Query and key, [T, H, K] each, at their positions."""
    from models.attention import triton_rows

    kernel: Any = triton_rows.rotate_kernel
    num_rows, num_heads, head_size = query.shape
    rotated = query.new_empty(2, *query.shape)
    with torch.cuda.device_of(query):
        kernel[-(-num_rows // ROTATED_ROWS), num_heads](
            *map(_rows, (query, key)),
            *_angles(rotation),
            *map(_rows, rotated),
            num_rows,
            HEAD=head_size,
            ROWS=ROTATED_ROWS,
        )
    return rotated[0], rotated[1]


def forward(inputs: Inputs) -> Mixed:
    from models.attention.triton_kernels import forward_kernel

    query = inputs.query
    mixed = Mixed(
        values=query.new_empty(query.shape),
        gated=None if inputs.gate is None else query.new_empty(query.shape),
        sums=row_figures(query),
    )
    arguments = (*_sources(inputs), _rows(mixed.values), _rows(mixed.gated), mixed.sums)
    _launch(forward_kernel, arguments, inputs, is_backward=False)
    return mixed


def backward(
    grad: Tensor, inputs: Inputs, mixed: Mixed, rotation: Rotation | None, grads: Sequence[Tensor]
) -> None:
    """Writes the gradients of query, key and value, and of the gate, if any, to `grads`.

    `grad` is that of the result, gated if there is a gate. With a `rotation`, those of query and
    key are of what they were before it.
    """
    from models.attention.triton_kernels import key_gradient_kernel, query_gradient_kernel

    *of_inputs, of_gate = map(_rows, grads if inputs.gate is not None else (*grads, None))
    of_query, of_key, of_value = of_inputs
    of_mixed = grad if inputs.gate is None else torch.empty_like(mixed.values)
    delta, angles = row_figures(grad), _angles(rotation)
    sources = _sources(inputs)
    arguments = (_rows(grad), *sources, _rows(mixed.values), mixed.sums, *angles, delta)
    results = (_rows(of_mixed), of_gate, of_query)
    _launch(query_gradient_kernel, (*arguments, *results), inputs, is_backward=True)
    arguments = (_rows(of_mixed), *sources[:3], mixed.sums, delta, *angles, of_key, of_value)
    _launch(key_gradient_kernel, arguments, inputs, is_backward=True)


def _launch(
    kernel: Any, arguments: Sequence[Rows | Tensor | None], inputs: Inputs, *, is_backward: bool
) -> None:
    """One program for each part of a tile and each head."""
    num_rows, num_heads, head_size = inputs.query.shape
    blocks = blocks_of(head_size, inputs.query.element_size(), is_backward=is_backward)
    num_programs = len(inputs.tiles) * (TILE_ROWS // blocks.rows)
    with torch.cuda.device_of(inputs.query):
        kernel[num_programs, num_heads](
            *arguments,
            inputs.tiles,
            num_rows,
            head_size**-0.5,
            **constants_of(head_size, blocks),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )


def _sources(inputs: Inputs) -> tuple[Rows | None, ...]:
    return tuple(map(_rows, (inputs.query, inputs.key, inputs.value, inputs.gate)))


def _angles(rotation: Rotation | None) -> tuple[Rows | None, Rows | None]:
    if rotation is None:
        return None, None
    return _rows(rotation.cos[:, 0]), _rows(rotation.sin[:, 0])


def _rows(tensor: Tensor | None) -> Rows | None:
    """For a kernel: rows and heads may have any strides."""
    from models.attention.triton_rows import Rows

    if tensor is None:
        return None
    assert tensor.stride(2) == 1
    return Rows(tensor, tensor.stride(0), tensor.stride(1))


def row_figures(rows: Tensor) -> Tensor:
    """[H, T] fp32, unwritten, for rows [T, H, K]."""
    return rows.new_empty(rows.shape[1], rows.shape[0], dtype=torch.float32)
