"""PrefixLM attention in one pass through our own Triton kernels, and the tiles that they work on.

Compiled code sees the whole attention as one operator of the packed rows and their tiles. The
number of tiles depends on T and on the slots for sequences alone, so lengths never recompile. What
a layer does around it, rotary positions and the gate, is in the same kernels where it is asked for:
rotated queries and keys are then not kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from models.attention import triton_launch
from models.attention.triton_launch import Inputs, Mixed, Rotation, filled, row_figures
from models.batch import PackedLayout

MAX_HEAD = 256


@dataclass(frozen=True, slots=True)
class OnePassPlan:
    """The tiles of one packed row."""

    tiles: Tensor  # [N, 4] int32

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(query, key, value, self.tiles)[0]

    def attend_gated(self, gqkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        return _attend_gated(gqkv, cos, sin, self.tiles)[0]

    def can_rotate(self, head_size: int) -> bool:
        return filled(head_size) == head_size


class TritonAttention:
    """CUDA from compute capability 8.0 on, with Triton, in any precision but fp64."""

    name = "triton"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        if device.type != "cuda":
            return "not CUDA"
        if torch.version.hip:
            return "a ROCm build, on which it is untested"
        if find_spec("triton") is None:
            return "triton is not installed"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{str(dtype).removeprefix('torch.')} is neither float32 nor half precision"
        if head_size > MAX_HEAD:
            return f"head size {head_size} is above {MAX_HEAD}"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> OnePassPlan:
        return OnePassPlan(sequence_tiles(layout, num_rows))


def sequence_tiles(layout: PackedLayout, num_rows: int) -> Tensor:
    """[N, 4] int32: at most TILE_ROWS rows of one sequence each; never waits for the device.

    First row, end of the sequence, its first row, end of its prefix. Padding counts as a sequence
    which sees from row T on: nothing. Tiles that are left over begin where nothing is left.
    """
    tile_rows, edges = triton_launch.TILE_ROWS, layout.cu_seqlens
    starts = edges  # [S + 1], as all that follow; the last one is the padding's
    ends = torch.cat((edges[1:], edges.new_full((1,), num_rows)))
    firsts_seen = torch.cat((edges[:-1], edges.new_full((1,), num_rows)))
    prefix_ends = torch.cat((edges[:-1] + layout.prefix_lens, edges.new_zeros(1)))
    counts = (ends - starts + tile_rows - 1) // tile_rows
    tile_ends = counts.cumsum(0, dtype=torch.int32)
    tile = torch.arange(num_rows // tile_rows + len(starts), dtype=torch.int32, device=edges.device)
    owner = torch.searchsorted(tile_ends, tile, right=True).clamp(max=len(starts) - 1)
    first = (starts - (tile_ends - counts) * tile_rows).index_select(0, owner) + tile * tile_rows
    others = torch.stack((ends, firsts_seen, prefix_ends), dim=1).index_select(0, owner)
    return torch.cat((first[:, None], others), dim=1)


@torch.library.custom_op("recurrent_lm::attend_one_pass", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, K] each -> what is mixed [T, H, K], and log-sum-exp of the scores [H, T] fp32."""
    query, key, value = map(_unit_stride, (query, key, value))
    mixed = triton_launch.forward(Inputs(query, key, value, None, tiles))
    return mixed.values, mixed.sums


@torch.library.custom_op("recurrent_lm::attend_one_pass_backward", mutates_args=())
def _attend_backward(
    rows: Sequence[Tensor], sums: Tensor, tiles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to query, key and value.

    `rows`: the gradient of what was mixed, query, key, value, and what was mixed.
    """
    grad, query, key, value, values = map(_unit_stride, rows)
    grads = tuple(grad.new_empty(grad.shape) for _ in range(3))
    inputs, mixed = Inputs(query, key, value, None, tiles), Mixed(values, None, sums)
    triton_launch.backward(grad, inputs, mixed, None, grads)
    of_query, of_key, of_value = grads
    return of_query, of_key, of_value


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), row_figures(query)


@_attend_backward.register_fake
def _(rows: Sequence[Tensor], sums: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, *_ = rows
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *rows, tiles = inputs
    ctx.save_for_backward(*rows, *output, tiles)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mixed, sums, tiles = ctx.saved_tensors
    return *_attend_backward([grad, query, key, value, mixed], sums, tiles), None


_attend.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("recurrent_lm::attend_gated", mutates_args=())
def _attend_gated(
    gqkv: Tensor, cos: Tensor | None, sin: Tensor | None, tiles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, query, key and value [T, 4, H, K] -> what is mixed, gated [T, H, K] and before that,
    and log-sum-exp of the scores [H, T] fp32."""
    inputs, _ = _rotated(gqkv, cos, sin, tiles)
    mixed = triton_launch.forward(inputs)
    assert mixed.gated is not None
    return mixed.gated, mixed.values, mixed.sums


@torch.library.custom_op("recurrent_lm::attend_gated_backward", mutates_args=())
def _attend_gated_backward(
    rows: Sequence[Tensor], gqkv: Tensor, cos: Tensor | None, sin: Tensor | None, tiles: Tensor
) -> Tensor:
    """The gradient to gate, query, key and value; query and key are rotated again and not kept.

    `rows`: the gradient of what was gated, what was mixed before that, and log-sum-exp.
    """
    grad, values, sums = rows
    inputs, rotation = _rotated(gqkv, cos, sin, tiles)
    of_gqkv = gqkv.new_empty(gqkv.shape)
    of_gate, *of_others = of_gqkv.unbind(1)
    mixed = Mixed(values, None, sums)
    triton_launch.backward(_unit_stride(grad), inputs, mixed, rotation, [*of_others, of_gate])
    return of_gqkv


def _rotated(
    gqkv: Tensor, cos: Tensor | None, sin: Tensor | None, tiles: Tensor
) -> tuple[Inputs, Rotation | None]:
    gate, query, key, value = _unit_stride(gqkv).unbind(1)
    if cos is None or sin is None:
        return Inputs(query, key, value, gate, tiles), None
    rotation = Rotation(cos, sin)
    return Inputs(*triton_launch.rotate(query, key, rotation), value, gate, tiles), rotation


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@_attend_gated.register_fake
def _(
    gqkv: Tensor, cos: Tensor | None, sin: Tensor | None, tiles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mixed = gqkv.new_empty(gqkv[:, 0].shape)
    return mixed, torch.empty_like(mixed), row_figures(mixed)


@_attend_gated_backward.register_fake
def _(
    rows: Sequence[Tensor], gqkv: Tensor, cos: Tensor | None, sin: Tensor | None, tiles: Tensor
) -> Tensor:
    return gqkv.new_empty(gqkv.shape)


def _keep_gated(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, *mixed_and_sums = output
    ctx.save_for_backward(*inputs, *mixed_and_sums)


def _backward_gated(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, mixed, sums = ctx.saved_tensors
    return _attend_gated_backward([grad, mixed, sums], *inputs), None, None, None


_attend_gated.register_autograd(_backward_gated, setup_context=_keep_gated)
