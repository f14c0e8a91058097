"""Sampled folder -> stream of PackedBatch: one epoch, one rank, from any position.

Owns how examples become rows (inputs, labels, positions), and the plan of a run. Which examples
share a row is `multipack_sampler`'s business; `training.prefetch` makes rows ahead in a process of
its own. A batch carries the position that follows it, so how far ahead that is never matters.
Shapes: T, S as in `models.batch`; n examples of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from data_io.sampled_format import CHUNK, EpochIndex, IntArray, SampledData
from models.batch import IGNORE_LABEL, SLOT_MULTIPLE, PackedBatch, PackedLayout
from multipack_sampler import MultipackSampler, count_epoch

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowPacking:
    """How examples become rows: the same on every rank."""

    batch_max_length: int  # T: tokens of one rank's row
    num_replicas: int  # rows of a global batch, one for each rank
    drop_last_batch: bool  # leave out the global batch that reaches the end of the epoch
    target_only: bool  # score responses only, and not instructions too
    micro_batch_size: int | None = None  # tokens; rows are split into batches of at most that

    @property
    def batch_tokens(self) -> int:
        """T: tokens of one batch as the model sees it, padding included."""
        return min(self.micro_batch_size or self.batch_max_length, self.batch_max_length)


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What the epochs of a run come to, counted from the packing itself."""

    steps: tuple[int, ...]  # global batches of each epoch
    num_slots: int  # S: holds the examples of any row of the run
    padding_share: float  # of all tokens in all rows
    mean_keys: float  # tokens that a token attends to, on average over the data


def plan_epochs(
    data: SampledData, packing: RowPacking, epochs: int, *, epoch: int = 0, cursor: int = 0
) -> EpochPlan:
    """Plans epochs 0 to `epochs - 1`, or what is left of them from (epoch, cursor) on."""
    data.require_epochs(epochs)
    steps, max_row_examples, filled_tokens, pairs, tokens = [], 1, 0, 0, 0
    for number in range(epoch, epochs):
        index = data.epoch(number)
        lengths = index.row_lengths()
        longest = int(lengths.argmax())
        if packing.micro_batch_size and lengths[longest] > packing.batch_tokens:
            raise ValueError(
                f"epoch {number} of {data.folder}: example {longest} takes {lengths[longest]} "
                f"tokens, more than micro_batch_size={packing.micro_batch_size}; make "
                "micro-batches at least that long"
            )
        count = count_epoch(
            lengths,
            batch_max_length=packing.batch_max_length,
            num_replicas=packing.num_replicas,
            drop_last_batch=packing.drop_last_batch,
            cursor=cursor if number == epoch else 0,
        )
        if count.final_cursor == 0:
            raise ValueError(
                f"epoch {number} of {data.folder} makes no step: its {len(lengths)} examples are "
                f"too few for a global batch of num_replicas={packing.num_replicas} rows of "
                f"batch_max_length={packing.batch_max_length} tokens"
                f"{', or it is the last one, which is dropped' * packing.drop_last_batch}; use "
                "fewer tokens in a batch, or more data"
            )
        steps.append(count.num_batches)
        max_row_examples = max(max_row_examples, count.max_row_examples)
        filled_tokens += count.filled_tokens
        pairs += _attended_pairs(index)
        tokens += int(lengths.sum(dtype=np.int64))
    row_tokens = sum(steps) * packing.num_replicas * packing.batch_max_length
    return EpochPlan(
        steps=tuple(steps),
        num_slots=-(-max_row_examples // SLOT_MULTIPLE) * SLOT_MULTIPLE,
        padding_share=1 - filled_tokens / max(1, row_tokens),
        mean_keys=pairs / max(1, tokens),
    )


def _attended_pairs(index: EpochIndex) -> int:
    """Pairs of tokens of which the first attends to the second, over a whole epoch."""
    pairs = 0
    for at in range(0, len(index), CHUNK):
        prefix_lens = index.inst_len[at : at + CHUNK].astype(np.int64)
        causal_lens = index.resp_len[at : at + CHUNK].astype(np.int64) - 1
        seen = prefix_lens * (prefix_lens + causal_lens) + causal_lens * (causal_lens + 1) // 2
        pairs += int(seen.sum())
    return pairs


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
