"""PrefixLM attention on a CPU that reads query, key and value where the projection left them.

Owns both passes over one packed row, without autograd: what `models.cpu_block` calls. A sequence by
itself is not copied, and its prefix never looks at its response; the short ones of a bucket (see
`models.attention.sdpa`) are copied together, and masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.attention.sdpa import Bucket

Kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BackwardKernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Alone:
    """One sequence: rows of the packed row."""

    start: int
    prefix_len: int
    length: int
    mask: Tensor | None  # [1, 1, R, length]: what its R rows after the prefix see, to be added

    def mix(self, gqkv: Tensor, mixed: Tensor) -> Iterator[Tensor]:
        """Fills its rows of `mixed` [T, H, K] from `gqkv` [T, 4, H, K]; yields log-sum-exps."""
        for rows, keys, mask in self._calls():
            query, key, value = _heads_first(gqkv, rows, keys)
            part, sums = Kernel(query, key, value, attn_mask=mask)
            mixed[rows] = part[0].transpose(0, 1)
            yield sums

    def add_gradients(
        self, grads: Tensor, gqkv: Tensor, mixed: Tensor, sums: Iterator[Tensor], into: Tensor
    ) -> None:
        """The same backwards: `grads` of `mixed`; `into` [T, 4, H, K] gets those of `gqkv`."""
        calls = [(*call, next(sums)) for call in self._calls()]
        for number, (rows, keys, mask, sum_of_rows) in enumerate(reversed(calls)):
            query, key, value = _heads_first(gqkv, rows, keys)
            of_mixed, was_mixed = (each[rows].transpose(0, 1)[None] for each in (grads, mixed))
            found = BackwardKernel(
                *(of_mixed, query, key, value, was_mixed, sum_of_rows, 0.0, False), attn_mask=mask
            )
            of_query, of_key, of_value = (each[0].transpose(0, 1) for each in found)
            into[rows, 1] = of_query
            if number:  # the response, before, has reached every key
                into[keys, 2] += of_key
                into[keys, 3] += of_value
            else:
                into[keys, 2], into[keys, 3] = of_key, of_value

    def _calls(self) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Rows that ask, rows that answer, and the mask between them."""
        prefix_end, end = self.start + self.prefix_len, self.start + self.length
        if self.prefix_len:
            yield slice(self.start, prefix_end), slice(self.start, prefix_end), None
        if self.mask is not None:
            yield slice(prefix_end, end), slice(self.start, end), self.mask


@dataclass(frozen=True, slots=True)
class Gathered:
    """Several sequences of about one length, padded to it."""

    bucket: Bucket
    mask: Tensor | None  # [num_seqs, 1, width, width], to be added

    def mix(self, gqkv: Tensor, mixed: Tensor) -> Iterator[Tensor]:
        """As `Alone.mix`; `mixed` has one row more, which padding slots write."""
        part, sums = Kernel(*self._gather(gqkv), attn_mask=self.mask)
        slots = part.transpose(1, 2).reshape(-1, mixed.shape[1] * mixed.shape[2])
        mixed.flatten(1).index_copy_(0, self.bucket.target_rows, slots)
        yield sums

    def add_gradients(
        self, grads: Tensor, gqkv: Tensor, mixed: Tensor, sums: Iterator[Tensor], into: Tensor
    ) -> None:
        """As `Alone.add_gradients`; `into` has one row more, which padding slots write."""
        of_mixed, was_mixed = self.bucket.gather(grads), self.bucket.gather(mixed)
        found = BackwardKernel(
            *(of_mixed, *self._gather(gqkv), was_mixed, next(sums), 0.0, False), attn_mask=self.mask
        )
        for number, part in enumerate(found, start=1):
            slots = part.transpose(1, 2).flatten(2).flatten(0, 1)  # [num_seqs * width, D]
            into[:, number].flatten(1).index_copy_(0, self.bucket.target_rows, slots)

    def _gather(self, gqkv: Tensor) -> Iterator[Tensor]:
        """Query, key and value, [num_seqs, H, width, K] each."""
        bucket = self.bucket
        slots = gqkv.flatten(1)[:, gqkv.stride(1) :].index_select(0, bucket.source_rows)
        shape = (bucket.num_seqs, bucket.width, 3, *gqkv.shape[2:])
        return (part.transpose(1, 2) for part in slots.view(shape).unbind(2))


def piece_of(bucket: Bucket) -> Alone | Gathered:
    """How the sequences of a bucket are computed."""
    prefix_len, length = bucket.prefix_len, bucket.length
    if bucket.num_seqs > 1 or bucket.width > length:
        visible = bucket.visible
        return Gathered(bucket, None if visible is None else additive(visible, torch.float32))
    asks = torch.arange(prefix_len, length)[:, None]
    visible = torch.arange(length) <= asks  # [R, length]
    mask = additive(visible[None, None], torch.float32) if prefix_len < length else None
    return Alone(bucket.start, prefix_len, length, mask)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it: 0 where visible, else minus infinity."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _heads_first(gqkv: Tensor, rows: slice, keys: slice) -> Iterator[Tensor]:
    """Query of `rows`, key and value of `keys`, [1, H, rows, K] each."""
    taken = ((1, rows), (2, keys), (3, keys))
    return (gqkv[where, number].transpose(0, 1)[None] for number, where in taken)
