"""Sampled folder -> stream of PackedBatch: one epoch, one rank, from any position.

Owns how examples become rows (inputs, labels, positions). Which examples share a row is
`multipack_sampler`'s business; `training.prefetch` makes rows ahead in a process of its own. A
batch carries the position that follows it, so how far ahead that is never matters.
Shapes: T, S as in `models.batch`; n examples of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from data_io.row_planning import RowPacking
from data_io.sampled_format import IntArray, SampledData
from models.batch import IGNORE_LABEL, PackedBatch, PackedLayout
from multipack_sampler import MultipackSampler

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


class RowArrays(NamedTuple):
    """The arrays of a batch, parts of one int32 vector that moves between processes whole."""

    tokens: Int32s  # [T]
    labels: Int32s  # [T]
    positions: Int32s  # [T]
    indices: Int32s  # [S]
    prefix_lens: Int32s  # [S]
    causal_lens: Int32s  # [S]

    @classmethod
    def within(cls, row: Int32s, num_slots: int) -> RowArrays:
        num_tokens = len(row) // 3 - num_slots
        sizes = [num_tokens] * 3 + [num_slots] * 3
        return cls(*np.split(row, np.cumsum(sizes)[:-1]))


class RowCounts(NamedTuple):
    """What belongs to a row beside its arrays; see PackedBatch."""

    num_seqs: int
    num_scored: int
    global_num_scored: int
    global_num_tokens: int
    next_cursor: int
    micro_index: int
    num_micro: int


class EpochReader:
    """Reads the examples of one epoch into rows, and knows which of their tokens are scored."""

    def __init__(self, data: SampledData, epoch: int, target_only: bool) -> None:
        self.data, self.target_only = data, target_only
        self.index, self.tokens, self.scored = data.epoch(epoch), data.tokens(), data.scored()

    def count_scored(self, start: int, stop: int) -> int:
        """Scored labels of the examples from `start` to before `stop`."""
        examples = slice(start, stop)
        resp_len = self.index.resp_len[examples].astype(np.int64)
        num_scored = 0 if self.target_only else int((self.index.inst_len[examples] - 1).sum())
        if self.scored is None:
            return num_scored + int(resp_len.sum())
        where = _stretches(self.index.resp_start[examples].astype(np.int64), resp_len)
        return num_scored + int(np.count_nonzero(self.scored[where]))

    def fill(self, arrays: RowArrays, examples: Int64s) -> int:
        """Writes the row that holds `examples` [n]; returns how many of its labels are scored."""
        count, num_slots = len(examples), len(arrays.indices)
        if count > num_slots:
            raise ValueError(
                f"a row holds {count} examples, but num_slots={num_slots}; use what plan_epochs "
                "counts for this packing"
            )
        index = self.index
        starts = _columns(index.inst_start[examples], index.resp_start[examples])  # [n, 2]
        lens = _columns(index.inst_len[examples], index.resp_len[examples])  # [n, 2]
        where = _stretches(starts.ravel(), lens.ravel())
        ids = self.tokens[where]  # of whole examples: each gives one input and one label less
        self.data.check_ids(ids, f"in one of the examples {examples.tolist()}")
        ids = ids.astype(np.int32)
        ends = lens.sum(1).cumsum()
        is_input, is_label = np.ones((2, len(ids)), np.bool_)
        is_input[ends - 1] = is_label[ends - lens.sum(1)] = False
        positions = _stretches(np.zeros(count, np.int64), lens.sum(1) - 1)
        is_scored = positions >= np.repeat(lens[:, 0] - 1, lens.sum(1) - 1)  # of the response
        if self.scored is not None:
            is_scored &= self.scored[where][is_label] != 0
        if not self.target_only:
            is_scored |= positions < np.repeat(lens[:, 0] - 1, lens.sum(1) - 1)

        labels = np.where(is_scored, ids[is_label], IGNORE_LABEL)
        contents = (ids[is_input], labels, positions, examples, lens[:, 0], lens[:, 1] - 1)
        paddings = (0, IGNORE_LABEL, 0, -1, 0, 0)
        for array, content, padding in zip(arrays, contents, paddings, strict=True):
            array[: len(content)], array[len(content) :] = content, padding
        return int(np.count_nonzero(is_scored))


def _columns(*columns: IntArray) -> Int64s:
    return np.stack(columns, 1, dtype=np.int64, casting="unsafe")


def _stretches(starts: Int64s, lens: Int64s) -> Int64s:
    """start, start + 1, ... of each stretch of the given length, one stretch after another."""
    ends = lens.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lens), lens)


class PrefixLMDataset(IterableDataset[PackedBatch]):
    """One epoch of one rank, from example `cursor` on, as packed batches of one shape."""

    def __init__(
        self,
        data: SampledData,
        packing: RowPacking,
        *,
        num_slots: int,
        epoch: int,
        cursor: int = 0,
        rank: int = 0,
    ) -> None:
        super().__init__()
        data.require_epochs(epoch + 1)
        self.data, self.packing, self.num_slots = data, packing, num_slots
        self.epoch, self.cursor, self.rank = epoch, cursor, rank
        self.row_size = 3 * (packing.batch_tokens + num_slots)

    def __iter__(self) -> Iterator[PackedBatch]:
        fresh_rows = (np.empty(self.row_size, np.int32) for _ in itertools.count())
        for row, counts in self.fill_rows(fresh_rows):
            yield self.batch(row, counts)

    def fill_rows(self, rows: Iterable[Int32s]) -> Iterator[tuple[Int32s, RowCounts]]:
        """Writes each batch into the next of the given vectors of `row_size`."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"num_workers={worker.num_workers} would repeat every batch; use 0 or 1"
            )
        packing = self.packing
        reader = EpochReader(self.data, self.epoch, packing.target_only)
        lengths = reader.index.row_lengths()
        sampler = MultipackSampler(
            lengths,
            batch_max_length=packing.batch_max_length,
            num_replicas=packing.num_replicas,
            rank=self.rank,
            drop_last_batch=packing.drop_last_batch,
            cursor=self.cursor,
        )
        rows = iter(rows)
        for part in sampler.in_micro_rows(packing.batch_tokens):
            global_num_scored = reader.count_scored(part.start_cursor, part.next_cursor)
            consumed = lengths[part.start_cursor : part.next_cursor]
            for micro_index, indices in enumerate(part.rows):
                row = next(rows)
                counts = RowCounts(
                    num_seqs=len(indices),
                    num_scored=reader.fill(RowArrays.within(row, self.num_slots), indices),
                    global_num_scored=global_num_scored,
                    global_num_tokens=int(consumed.sum(dtype=np.int64)),
                    next_cursor=part.next_cursor,
                    micro_index=micro_index,
                    num_micro=len(part.rows),
                )
                yield row, counts

    def batch(self, row: Int32s, counts: RowCounts) -> PackedBatch:
        """The batch that `row` holds; its tokens, labels and positions share the row's memory."""
        arrays, used = RowArrays.within(row, self.num_slots), counts.num_seqs
        return PackedBatch(
            tokens=torch.from_numpy(arrays.tokens),
            labels=torch.from_numpy(arrays.labels),
            positions=torch.from_numpy(arrays.positions),
            layout=PackedLayout.from_lengths(
                torch.from_numpy(arrays.prefix_lens[:used]),
                torch.from_numpy(arrays.causal_lens[:used]),
                self.num_slots,
            ),
            indices=torch.from_numpy(arrays.indices.astype(np.int64)),
            num_scored=counts.num_scored,
            global_num_scored=counts.global_num_scored,
            global_num_tokens=counts.global_num_tokens,
            next_cursor=counts.next_cursor,
            micro_index=counts.micro_index,
            num_micro=counts.num_micro,
        )
