"""PrefixLM attention through `scaled_dot_product_attention`, for CPUs and untested devices.

Sequences are copied into buckets of about equal length and each bucket is one padded call with a
boolean mask, built once per batch. Measured on a 2-core CPU in fp32 (T 4096, forward + backward):
buckets 16 wide take half the time of one call per sequence at lengths near 40, about the same near
200; one [T, T] mask takes 17 times as long. Neither fp32 masks nor softmax written out gained more.

The buckets of each batch are others, so compiled code does not see them: there the whole attention
is one operator of the packed rows and their lengths, whose shapes never change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention.in_place import Long, Together, additive, pieces_of
from models.batch import PackedLayout

FINE_WIDTH, COARSE_WIDTH = 16, 32  # bucket widths are multiples of these ...
COARSE_FROM = 128  # ... the second one from this length on
ALONE_FROM = 192  # sequences this long are calls of their own, without padding
WORTH_A_CALL = 64  # a bucket joins the next wider one where no more slots than that are added
PLANS_KEPT = 4  # for compiled code, which asks for the plan of its rows with every call


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


@dataclass(frozen=True, eq=False)  # without slots: it keeps what it makes once
class BucketPlan:
    """The sequences of a packed row of `num_rows` = T tokens; buckets are made when first used."""

    prefixes: tuple[int, ...]  # lengths, one for each of S slots
    edges: tuple[int, ...]  # as `PackedLayout.cu_seqlens`
    num_rows: int
    prefix_lens: Tensor  # [S]; the first two as tensors, for compiled code
    cu_seqlens: Tensor  # [S + 1]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return self.edges[-1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _attend_whole(query, key, value, self.prefix_lens, self.cu_seqlens)[0]
        if not self.buckets:  # a row of padding alone
            return (query + key + value) * 0.0
        gathered = (_ToBuckets.apply(rows, self) for rows in (query, key, value))
        mixed = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.visible)
            for bucket, q, k, v in zip(self.buckets, *gathered, strict=True)
        ]
        return _FromBuckets.apply(self, *mixed)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return _buckets(self)

    @cached_property
    def pieces(self) -> tuple[Together | Long, ...]:
        """The same sequences as `mix` takes them."""
        return pieces_of(self.prefixes, self.edges)

    def mix(self, gqkv: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`attend` without autograd on `gqkv` [T, 4, H, K], gate, query, key, value of each row:
        what is mixed [T, H, K], and what `mix_backward` asks for beside."""
        assert self.num_tokens <= self.num_rows == len(gqkv)  # kernels write without looking
        mixed = gqkv.new_empty(self.num_rows, *gqkv.shape[2:])
        mixed[self.num_tokens :] = 0.0
        kept = [each for piece in self.pieces for each in piece.mix(gqkv, mixed)]
        return mixed, kept

    def mix_backward(
        self, grads: Tensor, gqkv: Tensor, mixed: Tensor, kept: Sequence[Tensor], into: Tensor
    ) -> None:
        """From the gradients of `mixed` to those of query, key and value, in `into` [T, 4, H, K];
        `kept` is what `mix` returned."""
        into[self.num_tokens :, 1:] = 0.0
        given = iter(kept)
        for piece in self.pieces:
            piece.add_gradients(grads, gqkv, mixed, given, into)

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
        return _plan(layout.prefix_lens, layout.cu_seqlens, num_rows)


def _plan(prefix_lens: Tensor, cu_seqlens: Tensor, num_rows: int) -> BucketPlan:
    # sync: on other devices than the CPU, once per batch.
    lengths = tuple(prefix_lens.tolist()), tuple(cu_seqlens.tolist())
    return _plan_of_lengths(*lengths, num_rows, cu_seqlens.device)


@lru_cache(PLANS_KEPT)
def _plan_of_lengths(
    prefixes: tuple[int, ...], edges: tuple[int, ...], num_rows: int, device: torch.device
) -> BucketPlan:
    tensors = (torch.tensor(each, dtype=torch.int32, device=device) for each in (prefixes, edges))
    return BucketPlan(prefixes, edges, num_rows, *tensors)


def _buckets(plan: BucketPlan) -> tuple[Bucket, ...]:
    prefix_lens, starts = torch.tensor(plan.prefixes), torch.tensor(plan.edges)
    device = plan.cu_seqlens.device
    seq_lens = starts.diff()
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
            target_rows=rows.masked_fill(slot >= lens, plan.num_rows).flatten().to(device),
            visible=None if visible is None else visible.to(device),
        )
        buckets.append(bucket)
    return tuple(buckets)


def _sequences_by_width(seq_lens: list[int]) -> dict[int, list[int]]:
    """Sequence numbers by the width of their bucket; empty sequences are in none."""
    by_width: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(seq_lens):
        if length >= ALONE_FROM:
            by_width[length].append(index)
        elif length:
            step = COARSE_WIDTH if length >= COARSE_FROM else FINE_WIDTH
            by_width[-(-length // step) * step].append(index)
    widths = sorted(by_width)
    for width, wider in pairwise(widths):
        if wider < ALONE_FROM and len(by_width[width]) * (wider - width) <= WORTH_A_CALL:
            by_width[wider] = sorted(by_width[wider] + by_width.pop(width))
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


@torch.library.custom_op("recurrent_lm::attend_buckets", mutates_args=())
def _attend_whole(
    query: Tensor, key: Tensor, value: Tensor, prefix_lens: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """[T, H, K] each -> what is mixed [T, H, K], and log-sum-exp of the scores [T, H, 1] fp32."""
    plan = _plan(prefix_lens, cu_seqlens, len(query))
    logsumexp = query.new_zeros(*query.shape[:2], 1, dtype=torch.float32)
    if not plan.buckets:
        return query.new_zeros(query.shape), logsumexp
    mixed, sums = [], []
    for bucket in plan.buckets:
        q, k, v = (bucket.gather(rows) for rows in (query, key, value))
        part, part_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=_additive(bucket.visible, q.dtype)
        )
        mixed.append(part)
        sums.append(part_sums[..., None])
    return plan.scatter(mixed), plan.scatter(sums)


@torch.library.custom_op("recurrent_lm::attend_buckets_backward", mutates_args=())
def _attend_whole_backward(
    rows: Sequence[Tensor], prefix_lens: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to query, key and value; buckets are gathered again and not kept.

    `rows`: the gradient of what was mixed, query, key, value, what was mixed, and log-sum-exp.
    """
    grad, *_ = rows
    plan = _plan(prefix_lens, cu_seqlens, len(grad))
    if not plan.buckets:
        return grad.new_zeros(grad.shape), grad.new_zeros(grad.shape), grad.new_zeros(grad.shape)
    parts = []
    for bucket in plan.buckets:
        # A padding slot repeats a row's sum, which is not its own; its gradients are dropped.
        *slots, sums = (bucket.gather(each) for each in rows)
        parts.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *slots, sums[..., 0], 0.0, False, attn_mask=_additive(bucket.visible, grad.dtype)
            )
        )
    of_query, of_key, of_value = zip(*parts, strict=True)
    return plan.scatter(of_query), plan.scatter(of_key), plan.scatter(of_value)


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if visible is None else additive(visible, dtype)


@_attend_whole.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, prefix_lens: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        query.new_empty(*query.shape[:2], 1, dtype=torch.float32),
    )


@_attend_whole_backward.register_fake
def _(
    rows: Sequence[Tensor], prefix_lens: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, *_ = rows
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *rows, prefix_lens, cu_seqlens = ctx.saved_tensors
    return *_attend_whole_backward([grad, *rows], prefix_lens, cu_seqlens), None, None


_attend_whole.register_autograd(_backward, setup_context=_keep)
