"""The packed batch: whole examples side by side in one row of T tokens, and where each sits.

Owns the types that carry a batch from the data loader to the model, not how they are made.
Shapes: T tokens of a packed row (padding included), S sequence slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_LABEL = -100


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each sequence sits in a packed row and how far its prefix reaches.

    A sequence is its prefix (attended in both directions) followed by its causal part. The scalars
    are 0-d CPU tensors: Python integers would recompile the step for each new value, and reading
    them never waits for a device.
    """

    prefix_lens: Tensor  # [S] int32; 0 in unused slots
    causal_lens: Tensor  # [S] int32; 0 in unused slots
    cu_seqlens: Tensor  # [S + 1] int32; unused slots repeat the last offset
    num_seqs: Tensor  # [] int32 on CPU, as all that follow
    num_tokens: Tensor  # without padding
    max_prefix_len: Tensor
    max_causal_len: Tensor
    max_seq_len: Tensor

    @classmethod
    def from_lengths(cls, prefix_lens: Tensor, causal_lens: Tensor, num_slots: int) -> PackedLayout:
        """Lays sequences out one after another; lengths are [n] integers on CPU."""
        num_seqs = len(prefix_lens)
        if num_seqs > num_slots:
            raise ValueError(f"{num_seqs} sequences do not fit into num_slots={num_slots}")
        lens = torch.zeros(2, num_slots, dtype=torch.int32)
        lens[0, :num_seqs] = prefix_lens
        lens[1, :num_seqs] = causal_lens
        if bool((lens < 0).any()):
            raise ValueError(
                f"sequence lengths must not be negative: {prefix_lens=}, {causal_lens=}"
            )
        seq_lens = lens.sum(0, dtype=torch.int32)
        cu_seqlens = torch.zeros(num_slots + 1, dtype=torch.int32)
        torch.cumsum(seq_lens, 0, dtype=torch.int32, out=cu_seqlens[1:])
        return cls(
            prefix_lens=lens[0],
            causal_lens=lens[1],
            cu_seqlens=cu_seqlens,
            num_seqs=torch.tensor(num_seqs, dtype=torch.int32),
            num_tokens=cu_seqlens[-1].clone(),
            max_prefix_len=lens[0].amax(),
            max_causal_len=lens[1].amax(),
            max_seq_len=seq_lens.amax(),
        )

    def map_vectors(self, function: Callable[[Tensor], Tensor]) -> PackedLayout:
        """The same layout with `function` applied to its vectors; the scalars stay on CPU."""
        vectors = ("prefix_lens", "causal_lens", "cu_seqlens")
        return replace(self, **{name: function(getattr(self, name)) for name in vectors})

    def as_causal(self) -> PackedLayout:
        """The same sequences with their prefixes made causal (`attn_type: causal`)."""
        return replace(
            self,
            prefix_lens=torch.zeros_like(self.prefix_lens),
            causal_lens=self.prefix_lens + self.causal_lens,
            max_prefix_len=torch.zeros_like(self.max_prefix_len),
            max_causal_len=self.max_seq_len,
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One rank's row of a global batch, or one of the micro-batches that it is split into."""

    tokens: Tensor  # [T] int32; 0 in padding
    labels: Tensor  # [T] int32; IGNORE_LABEL where nothing is scored
    positions: Tensor  # [T] int32; from 0 in each sequence, 0 in padding
    layout: PackedLayout
    indices: Tensor  # [S] int64 on CPU: the examples of the epoch in this row; -1 in unused slots
    num_scored: int  # labels of this row that are scored
    global_num_scored: int  # the same over all ranks
    global_num_tokens: int  # tokens of all ranks, without padding
    next_cursor: int  # examples of the epoch consumed once this global batch is done
    micro_index: int = 0  # which of the row's micro-batches this is
    num_micro: int = 1  # how many there are, on every rank

    def map_vectors(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `function` applied to what the model reads; host data stays."""
        return replace(
            self,
            tokens=function(self.tokens),
            labels=function(self.labels),
            positions=function(self.positions),
            layout=self.layout.map_vectors(function),
        )

    def without_padding(self, multiple: int) -> PackedBatch:
        """The same batch, its rows behind the last sequence cut off, up to a multiple."""
        num_rows = max(1, -(-int(self.layout.num_tokens) // multiple)) * multiple
        vectors = ("tokens", "labels", "positions")
        return replace(self, **{name: getattr(self, name)[:num_rows] for name in vectors})

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`; what only the host needs stays there."""
        return self.map_vectors(lambda vector: vector.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (the data loader calls this by name)."""
        return self.map_vectors(Tensor.pin_memory)
