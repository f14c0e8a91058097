"""PrefixLM attention through `scaled_dot_product_attention`, for CPUs and untested devices.

Sequences are gathered into buckets of about equal length and each bucket is one padded call with a
boolean mask, built once per batch. Measured on a 2-core CPU in fp32 (T 4096, forward + backward):
buckets 16 wide take half the time of one call per sequence at lengths near 40, about the same near
200; one [T, T] mask takes 17 times as long.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.batch import PackedLayout

FINE_WIDTH, COARSE_WIDTH = 16, 32  # bucket widths are multiples of these ...
COARSE_FROM = 128  # ... the second one from this length on
ALONE_FROM = 512  # sequences this long are calls of their own, without padding


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of about equal length: `num_seqs` of at most `width` tokens."""

    num_seqs: int
    width: int
    visible: Tensor | None  # [num_seqs, 1, width, width] bool; None: everything sees everything


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Buckets, and how the rows of a packed batch map to their slots (N slots in all)."""

    buckets: tuple[Bucket, ...]
    row_of_slot: Tensor  # [N] int64; padding slots repeat a row of their sequence
    slot_of_row: Tensor  # [T] int64; padding rows: any slot
    padding_slots: Tensor  # int64
    padding_rows: Tensor  # int64

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_heads, head_size = query.shape[1:]
        slotted = [_ToSlots.apply(tensor.flatten(1), self) for tensor in (query, key, value)]
        sizes = [bucket.num_seqs * bucket.width for bucket in self.buckets]
        mixed = []
        for bucket, *parts in zip(self.buckets, *(s.split(sizes) for s in slotted), strict=True):
            shape = (bucket.num_seqs, bucket.width, num_heads, head_size)
            q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.visible)
            mixed.append(out.transpose(1, 2).reshape(-1, num_heads * head_size))
        if not mixed:  # a row of padding alone
            return (query + key + value) * 0.0
        all_slots = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return _FromSlots.apply(all_slots, self).view_as(query)


class SdpaAttention:
    """Runs wherever torch does."""

    name = "sdpa"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> BucketPlan:
        device = layout.cu_seqlens.device
        num_seqs = int(layout.num_seqs)
        # sync: on other devices than the CPU, once per batch.
        prefix_lens = layout.prefix_lens[:num_seqs].cpu().long()
        seq_lens = prefix_lens + layout.causal_lens[:num_seqs].cpu()
        starts = layout.cu_seqlens[:num_seqs].cpu().long()
        buckets, rows, is_padding = [], [], []
        for width, members in _sequences_by_width(seq_lens.tolist()).items():
            index = torch.tensor(members)
            lens = seq_lens[index, None]
            column = torch.arange(width)
            rows.append((starts[index, None] + column.minimum(lens - 1)).flatten())
            is_padding.append((column >= lens).flatten())
            visible = _visible(prefix_lens[index], seq_lens[index], width)
            buckets.append(Bucket(len(members), width, None if visible is None else visible.to(device)))
        row_of_slot = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        padding = torch.cat(is_padding) if rows else torch.empty(0, dtype=torch.bool)
        slot_of_row = torch.zeros(num_rows, dtype=torch.int64)
        slot_of_row[row_of_slot[~padding]] = (~padding).nonzero().squeeze(1)
        return BucketPlan(
            buckets=tuple(buckets),
            row_of_slot=row_of_slot.to(device),
            slot_of_row=slot_of_row.to(device),
            padding_slots=padding.nonzero().squeeze(1).to(device),
            padding_rows=torch.arange(int(layout.num_tokens), num_rows).to(device),
        )


def _sequences_by_width(seq_lens: list[int]) -> dict[int, list[int]]:
    """Sequence numbers by the width of their bucket; empty sequences are in none."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(seq_lens):
        if length >= ALONE_FROM:
            by_width[length].append(index)
        elif length:
            step = COARSE_WIDTH if length >= COARSE_FROM else FINE_WIDTH
            by_width[-(-length // step) * step].append(index)
    return dict(sorted(by_width.items()))


def _visible(prefix_lens: Tensor, seq_lens: Tensor, width: int) -> Tensor | None:
    """The mask of one bucket. Padding slots see their sequence: a row that sees nothing is NaN."""
    query = torch.arange(width)[:, None]
    key = torch.arange(width)
    prefix = prefix_lens[:, None, None]
    visible = (key < prefix) | (key <= query)
    visible &= (query >= prefix) | (key < prefix)
    visible &= key < seq_lens[:, None, None]
    return None if bool(visible.all()) else visible[:, None]


def _to_slots(rows: Tensor, plan: BucketPlan) -> Tensor:
    return rows.index_select(0, plan.row_of_slot)


def _from_slots(slots: Tensor, plan: BucketPlan) -> Tensor:
    rows = slots.index_select(0, plan.slot_of_row)
    return rows.index_fill_(0, plan.padding_rows, 0.0)


class _ToSlots(torch.autograd.Function):
    """Packed rows to bucket slots; both directions are gathers, which scatter-add is not."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: BucketPlan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        return _to_slots(rows, plan)

    @staticmethod
    def backward(ctx, grad_slots: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # What padding slots get stays behind: as keys they are masked, as queries unused.
        return _from_slots(grad_slots, ctx.plan), None


class _FromSlots(torch.autograd.Function):
    """Bucket slots back to packed rows, zero in padding rows."""

    @staticmethod
    def forward(ctx, slots: Tensor, plan: BucketPlan) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        return _from_slots(slots, plan)

    @staticmethod
    def backward(ctx, grad_rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_slots = _to_slots(grad_rows, ctx.plan)
        return grad_slots.index_fill_(0, ctx.plan.padding_slots, 0.0), None
