"""PrefixLM attention through `scaled_dot_product_attention`, for CPUs and untested devices.

Sequences are copied into buckets of about equal length and each bucket is one padded call with a
boolean mask, built once per batch. Measured on a 2-core CPU in fp32 (T 4096, forward + backward):
buckets 16 wide take half the time of one call per sequence at lengths near 40, about the same near
200; one [T, T] mask takes 17 times as long. Neither fp32 masks nor softmax written out gained more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    """`num_seqs` sequences of at most `width` tokens, each in `width` slots."""

    num_seqs: int
    width: int
    source_rows: Tensor  # [num_seqs * width] int64; padding slots repeat their sequence's last row
    target_rows: Tensor  # the same, but padding slots go to row T, which is dropped
    visible: Tensor | None  # [num_seqs, 1, width, width] bool; None: everything sees everything

    def gather(self, rows: Tensor) -> Tensor:
        """[T, H, K] -> [num_seqs, H, width, K]."""
        slots = rows.flatten(1).index_select(0, self.source_rows)
        return slots.view(self.num_seqs, self.width, *rows.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """The buckets of a packed row of `num_rows` = T tokens, `num_tokens` without padding."""

    buckets: tuple[Bucket, ...]
    num_tokens: int
    num_rows: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.buckets:  # a row of padding alone
            return (query + key + value) * 0.0
        gathered = (_ToBuckets.apply(rows, self) for rows in (query, key, value))
        mixed = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.visible)
            for bucket, q, k, v in zip(self.buckets, *gathered, strict=True)
        ]
        return _FromBuckets.apply(self, *mixed)

    def scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """What each bucket holds, [num_seqs, H, width, K], to [T, H, K]; zero in padding rows."""
        num_heads, head_size = parts[0].shape[1], parts[0].shape[3]
        rows = parts[0].new_empty(self.num_rows + 1, num_heads * head_size)
        rows[self.num_tokens :] = 0.0
        for bucket, part in zip(self.buckets, parts, strict=True):
            slots = part.transpose(1, 2).reshape(-1, num_heads * head_size)
            rows.index_copy_(0, bucket.target_rows, slots)
        return rows[: self.num_rows].unflatten(1, (num_heads, head_size))


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
        buckets = []
        for width, members in _sequences_by_width(seq_lens.tolist()).items():
            index = torch.tensor(members)
            lens, slot = seq_lens[index, None], torch.arange(width)
            rows = starts[index, None] + slot.minimum(lens - 1)
            visible = _visible(prefix_lens[index], seq_lens[index], width)
            bucket = Bucket(
                num_seqs=len(members),
                width=width,
                source_rows=rows.flatten().to(device),
                target_rows=rows.masked_fill(slot >= lens, num_rows).flatten().to(device),
                visible=None if visible is None else visible.to(device),
            )
            buckets.append(bucket)
        return BucketPlan(tuple(buckets), int(layout.num_tokens), num_rows)


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
    """The mask of one bucket. Padding slots see one another: if they saw nothing they would be NaN,
    if they saw tokens these would get the gradient of the rows that the slots repeat."""
    query, key = torch.arange(width)[:, None], torch.arange(width)
    prefix, length = prefix_lens[:, None, None], seq_lens[:, None, None]
    visible = torch.where(query < prefix, key < prefix, key <= query)
    visible &= (query < length) == (key < length)
    return None if bool(visible.all()) else visible[:, None]


class _ToBuckets(torch.autograd.Function):
    """Packed rows to buckets; the backward pass copies, since each row has one slot."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: BucketPlan) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.plan = plan
        return tuple(bucket.gather(rows) for bucket in plan.buckets)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.plan.scatter(grads), None


class _FromBuckets(torch.autograd.Function):
    """Buckets back to packed rows, zero in padding rows."""

    @staticmethod
    def forward(ctx, plan: BucketPlan, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.plan = plan
        return plan.scatter(parts)

    @staticmethod
    def backward(ctx, grad_rows: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *(bucket.gather(grad_rows) for bucket in ctx.plan.buckets)
