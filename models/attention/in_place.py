"""PrefixLM attention on a CPU that reads query, key and value where the projection left them.

Owns both passes over one packed row, without autograd: what `models.cpu_block` calls. Nothing is
copied or padded. Short sequences go through `models.cpu_attention` all at once; a long one through
torch's kernel by itself, its prefix, which never looks at its response, first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BackwardKernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LONG_FROM = 256  # tokens; measured at K 64: torch's kernel is as fast there, and faster at 384


@dataclass(frozen=True, slots=True)
class Long:
    """One sequence: rows of the packed row."""

    start: int
    prefix_len: int
    length: int
    mask: Tensor | None  # [1, 1, R, length]: what its R rows after the prefix see, to be added

    def mix(self, gqkv: Tensor, mixed: Tensor) -> Iterator[Tensor]:
        """Fills its rows of `mixed` [T, H, K] from `gqkv` [T, 4, H, K]; yields what to keep."""
        for rows, keys, mask in self._calls():
            query, key, value = _heads_first(gqkv, rows, keys)
            part, sums = Kernel(query, key, value, attn_mask=mask)
            mixed[rows] = part[0].transpose(0, 1)
            yield sums

    def add_gradients(
        self, grads: Tensor, gqkv: Tensor, mixed: Tensor, kept: Iterator[Tensor], into: Tensor
    ) -> None:
        """The same backwards: `grads` of `mixed`; `into` [T, 4, H, K] gets those of `gqkv`."""
        calls = [(*call, next(kept)) for call in self._calls()]
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
class Together:
    """Several short sequences."""

    sequences: Tensor  # [n, 3] int64: first row, length of the prefix, of all

    def mix(self, gqkv: Tensor, mixed: Tensor) -> Iterator[Tensor]:
        """As `Long.mix`."""
        from models import cpu_attention  # compiled when first imported

        yield cpu_attention.mix(gqkv, self.sequences, mixed)

    def add_gradients(
        self, grads: Tensor, gqkv: Tensor, mixed: Tensor, kept: Iterator[Tensor], into: Tensor
    ) -> None:
        """As `Long.add_gradients`."""
        from models import cpu_attention

        cpu_attention.mix_backward(grads, gqkv, self.sequences, next(kept), into)


def pieces_of(prefix_lens: Sequence[int], edges: Sequence[int]) -> tuple[Together | Long, ...]:
    """How the sequences of a packed row are computed; `edges` as `PackedLayout.cu_seqlens`."""
    short, pieces = [], []
    for (start, end), prefix_len in zip(pairwise(edges), prefix_lens, strict=True):
        assert 0 <= prefix_len <= end - start  # kernels read without looking
        if end - start >= LONG_FROM:
            pieces.append(Long(start, prefix_len, end - start, _mask(prefix_len, end - start)))
        elif end > start:
            short.append((start, prefix_len, end - start))
    return (Together(torch.tensor(short)), *pieces) if short else tuple(pieces)


def _mask(prefix_len: int, length: int) -> Tensor | None:
    if prefix_len == length:
        return None
    asks = torch.arange(prefix_len, length)[:, None]
    visible = torch.arange(length) <= asks  # [R, length]
    return additive(visible[None, None], torch.float32)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it: 0 where visible, else minus infinity."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _heads_first(gqkv: Tensor, rows: slice, keys: slice) -> Iterator[Tensor]:
    """Query of `rows`, key and value of `keys`, [1, H, rows, K] each."""
    taken = ((1, rows), (2, keys), (3, keys))
    return (gqkv[where, number].transpose(0, 1)[None] for number, where in taken)
