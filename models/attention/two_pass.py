"""PrefixLM attention as two calls of a variable-length kernel, for kernels that know no such mask.

Prefix tokens attend to their prefix in both directions, response tokens to their whole sequence,
causally. Nothing is gathered: each call covers all T rows by segments whose queries and keys are
ranges of rows, and a row that takes no part has a segment without keys (queries: output zero) or
without queries (keys: gradient zero). So both calls write every row, padding included, and the
results add up. Gathering the rows of each call instead would need fewer segments (S per call), but
copies 4 T rows forward, keeps them for the backward pass, and scatters there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import PackedLayout

PADDING_PIECES = 8  # padding is cut: the longest segment sets the size of the kernel's grid


@dataclass(frozen=True, slots=True)
class Segments:
    """One call: segment i attends from rows cu_q[i] : cu_q[i + 1] to rows cu_k[i] : cu_k[i + 1].

    Causal means that the last query of a segment sees its last key (bottom-right aligned).
    """

    cu_q: Tensor  # [N + 1] int32, from 0 to T
    cu_k: Tensor  # [N + 1] int32, from 0 to T
    max_q: Tensor  # [] int32 on CPU: not below any segment's number of queries, at least 1
    max_k: Tensor  # [] int32 on CPU
    is_causal: bool


# (query, key, value, segments) -> mixed values; [T, H, K] each
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]


@dataclass(frozen=True, slots=True)
class TwoPassPlan:
    """The segments of both calls, and the kernel that computes them."""

    kernel: VarlenKernel
    prefix: Segments | None  # None where every sequence is causal from its first token
    response: Segments

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = self.kernel(query, key, value, self.response)
        if self.prefix is None:
            return mixed
        return mixed + self.kernel(query, key, value, self.prefix)


def two_pass_plan(layout: PackedLayout, num_rows: int, kernel: VarlenKernel) -> TwoPassPlan:
    """The plan of one packed row of `num_rows` = T tokens; never waits for the device."""
    edges = layout.cu_seqlens  # [S + 1]
    prefix_ends = edges[:-1] + layout.prefix_lens
    piece = torch.arange(1, PADDING_PIECES + 1, dtype=torch.int32, device=edges.device)
    padding_ends = edges[-1:] + (num_rows - edges[-1:]) * piece // PADDING_PIECES
    padding_starts = torch.cat((edges[-1:], padding_ends[:-1]))
    starts = torch.cat((edges[:-1], padding_starts))
    ends = torch.cat((edges[1:], padding_ends))

    padding_len = num_rows - layout.num_tokens
    longest_piece = (padding_len + PADDING_PIECES - 1) // PADDING_PIECES
    longest_part = torch.stack((layout.max_prefix_len, layout.max_causal_len, longest_piece)).amax()
    longest_seq = torch.maximum(layout.max_seq_len, longest_piece)

    # (prefix, prefix), (nothing, response), (response, nothing); padding counts as response
    middles = torch.cat((prefix_ends, padding_starts))
    prefix = Segments(
        cu_q=_offsets(middles, middles, ends),
        cu_k=_offsets(middles, ends, ends),
        max_q=longest_part,
        max_k=longest_part,
        is_causal=False,
    )
    # (prefix, nothing), (response, sequence); padding counts as prefix, and its keys are unused
    middles = torch.cat((prefix_ends, padding_ends))
    response = Segments(
        cu_q=_offsets(middles, ends),
        cu_k=_offsets(starts, ends),
        max_q=longest_part,
        max_k=longest_seq,
        is_causal=True,
    )
    # A row of padding alone keeps both calls: another number of them would compile again.
    has_prefixes = int(layout.max_prefix_len) > 0 or int(layout.num_seqs) == 0
    return TwoPassPlan(kernel, prefix if has_prefixes else None, response)


def _offsets(*right_edges: Tensor) -> Tensor:
    """Row 0 and then, sequence by sequence, where each of its segments ends."""
    interleaved = torch.stack(right_edges, dim=1).flatten()
    return torch.cat((interleaved.new_zeros(1), interleaved))
