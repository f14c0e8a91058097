"""PrefixLM attention through FlexAttention (Triton): one pass, with a mask built from lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batch import PackedLayout

if TYPE_CHECKING:  # imported when first needed: it takes a second
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # rows and columns of a block of the mask
SMALLEST_HEAD = 16


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """The block mask of one packed row, and the compiled function that takes it."""

    block_mask: BlockMask
    flex_attention: Callable[..., Any]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, H, T, K]
        mixed = self.flex_attention(q, k, v, block_mask=self.block_mask)  # [1, H, T, K]
        return mixed[0].transpose(0, 1)


class FlexAttention:
    """CUDA with Triton."""

    name = "flex"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        if device.type != "cuda":
            return "not CUDA"
        if find_spec("triton") is None:
            return "triton is not installed"
        if head_size < SMALLEST_HEAD:
            return f"head size {head_size} is below {SMALLEST_HEAD}"
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> FlexPlan:
        return FlexPlan(prefix_lm_block_mask(layout, num_rows), compiled_flex_attention())


@cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Compiled for the first T, then for any; uncompiled it would make a [T, T] matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def visible_ranges(layout: PackedLayout, num_rows: int) -> tuple[Tensor, Tensor]:
    """[T] int32 each: row i sees the keys from first[i] to before limit[i], which includes itself.

    Padding sees none: its ranges run backwards, from T to 0.
    """
    cu_seqlens = layout.cu_seqlens
    row = torch.arange(num_rows, dtype=torch.int32, device=cu_seqlens.device)
    slot = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=len(cu_seqlens) - 2)
    first = cu_seqlens.index_select(0, slot)
    prefix_end = first + layout.prefix_lens.index_select(0, slot)
    limit = torch.maximum(prefix_end, row + 1)
    is_padding = row >= cu_seqlens[-1]
    return first.masked_fill(is_padding, num_rows), limit.masked_fill(is_padding, 0)


def prefix_lm_block_mask(layout: PackedLayout, num_rows: int) -> BlockMask:
    """Which blocks are visible in part or whole; never waits for the device."""
    from torch.nn.attention.flex_attention import BlockMask

    first, limit = visible_ranges(layout, num_rows)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < limit[query])

    num_blocks = -(-num_rows // BLOCK)
    padded = (0, num_blocks * BLOCK - num_rows)
    firsts = F.pad(first, padded, value=num_rows).view(num_blocks, BLOCK)
    limits = F.pad(limit, padded, value=0).view(num_blocks, BLOCK)
    block_start = torch.arange(num_blocks, device=first.device) * BLOCK
    block_end = block_start + BLOCK
    # Neighbours' ranges touch, so a block of rows sees the keys from the least to the largest.
    any_visible = (block_end > firsts.amin(1)[:, None]) & (block_start < limits.amax(1)[:, None])
    all_visible = (block_start >= firsts.amax(1)[:, None]) & (block_end <= limits.amin(1)[:, None])
    partly_count, partly = _listed(any_visible & ~all_visible)
    wholly_count, wholly = _listed(all_visible)
    return BlockMask.from_kv_blocks(
        partly_count,
        partly,
        wholly_count,
        wholly,
        BLOCK_SIZE=BLOCK,
        mask_mod=is_visible,
        seq_lengths=(num_rows, num_rows),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] bool -> how many in each row [1, 1, N], and which, then the others [1, 1, N, N]."""
    count = blocks.sum(1, dtype=torch.int32)
    order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], order[None, None]
