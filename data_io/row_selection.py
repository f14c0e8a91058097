"""Which rows of a tokenized source may be sampled, and how long they then are.

Too short responses go; what is longer than the context is cut or goes, as the mixture says. Rows
that stay are called usable and are numbered through, in file order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_io.mixing import MixtureRule
from data_io.tokenized_format import TokenizedSource

MAX_CHUNK_ROWS = 2**18
CHUNK_TOKENS = 2**24  # rows of one chunk have no more, whatever their length

Integer = TypeVar("Integer", bound=np.integer[Any])
Int64s = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LengthRules:
    """What makes a row usable, beside the mixture's rule for its source."""

    context_size: int  # tokens of instruction and response together
    min_resp_length: int  # of the response as tokenized, before any cut

    @property
    def chunk_rows(self) -> int:
        """Rows that are read together."""
        return min(MAX_CHUNK_ROWS, max(1, CHUNK_TOKENS // self.context_size))


@dataclass(slots=True)
class UsableRows:
    """The usable rows of one source. Holds no file open: there may be thousands of sources."""

    folder: Path
    rule: MixtureRule
    lengths: LengthRules
    num_file_rows: int
    usable: Mask | None  # [num_file_rows]; None: all of them
    num_cut: int  # usable rows whose response is cut
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows

    @property
    def name(self) -> str:
        return self.folder.name

    def __len__(self) -> int:
        return self.num_file_rows if self.usable is None else int(np.count_nonzero(self.usable))

    @classmethod
    def of_source(
        cls, source: TokenizedSource, rule: MixtureRule, lengths: LengthRules
    ) -> UsableRows:
        """Judges every row; ValueError for one that reaches beyond the tokens."""
        source.check()
        rows = cls(source.folder, rule, lengths, len(source), np.ones(len(source), np.bool_), 0)
        assert rows.usable is not None
        for at in range(0, len(source), MAX_CHUNK_ROWS):
            part = slice(at, at + MAX_CHUNK_ROWS)
            rows.usable[part] = rows._judge(
                source.inst_len[part].astype(np.int64), source.resp_len[part].astype(np.int64)
            )
        if rows.usable.all():
            rows.usable = None
        return rows

    def _judge(self, inst_len: Int64s, resp_len: Int64s) -> Mask:
        limit = self.lengths.context_size
        is_short = resp_len < self.lengths.min_resp_length
        is_long = inst_len + resp_len > limit
        if self.rule.long_context == "drop":
            reason = f"longer than context_size={limit}"
        else:
            self.num_cut += int(np.count_nonzero(is_long & ~is_short & (inst_len < limit)))
            is_long = inst_len >= limit  # nothing of the response is left
            reason = f"instruction of context_size={limit} tokens or more"
        self._drop(f"response below min_resp_length={self.lengths.min_resp_length}", is_short)
        self._drop(reason, is_long & ~is_short)
        return ~(is_short | is_long)

    def _drop(self, reason: str, which: Mask) -> None:
        self.dropped += Counter({reason: int(np.count_nonzero(which))})

    def leave_out(self, unwanted: Mask, reason: str) -> None:
        """Makes usable rows unusable; `unwanted` has a value per usable row."""
        self._drop(reason, unwanted)
        if self.usable is None:
            self.usable = ~unwanted
        else:
            self.usable[self.usable] = ~unwanted


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Some usable rows of one source, in file order; n rows."""

    first: int  # the number of the first one among the usable rows
    inst_start: Int64s  # [n]
    inst_len: Int64s
    resp_start: Int64s
    resp_len: Int64s  # after the cut
    whole_resp_len: Int64s  # before

    def __len__(self) -> int:
        return len(self.inst_len)

    def only(self, wanted: Mask | None) -> RowChunk:
        """The rows where `wanted` [n] is true; None: all."""
        if wanted is None or wanted.all():
            return self
        columns = (self.inst_start, self.inst_len, self.resp_start, self.resp_len)
        return RowChunk(self.first, *(column[wanted] for column in (*columns, self.whole_resp_len)))

    def gathered(self, values: NDArray[Integer], *, whole: bool = False) -> NDArray[Integer]:
        """What the rows have of tokens.npy or scored.npy, one after another: instruction, response
        (`whole`: as it was before the cut), and the next row."""
        resp_len = self.whole_resp_len if whole else self.resp_len
        starts = np.stack([self.inst_start, self.resp_start], 1).ravel()
        ends = starts + np.stack([self.inst_len, resp_len], 1).ravel()
        begins: Mask = np.ones(len(starts), np.bool_)
        np.not_equal(starts[1:], ends[:-1], out=begins[1:])  # neighbours are read together
        pairs = zip(starts[begins].tolist(), ends[np.roll(begins, -1)].tolist(), strict=True)
        return np.concatenate([values[:0], *(values[start:end] for start, end in pairs)])


def usable_chunks(source: TokenizedSource, rows: UsableRows) -> Iterator[RowChunk]:
    """All usable rows, some at a time."""
    first = 0
    for at in range(0, len(source), rows.lengths.chunk_rows):
        part = slice(at, at + rows.lengths.chunk_rows)
        wanted = slice(None) if rows.usable is None else rows.usable[part]
        columns = (source.inst_start, source.inst_len, source.resp_start, source.resp_len)
        inst_start, inst_len, resp_start, whole = (
            column[part].astype(np.int64)[wanted] for column in columns
        )
        resp_len = np.minimum(whole, rows.lengths.context_size - inst_len)
        yield RowChunk(first, inst_start, inst_len, resp_start, resp_len, whole)
        first += len(inst_len)
