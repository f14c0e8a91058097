"""Lengths of examples -> the row of every rank, global batch by global batch (LPT multipack).

Owns the packing, which all ranks compute alike, each keeping its own row. It is a function of the
lengths alone and can start at any example; it knows nothing of tokens. Compiled by numba.

A global batch is the largest number of examples, found by bisection, that "longest processing time
first" (LPT) fits into `rows` rows of `width` tokens. Two bounds spare nearly all LPT runs:

- more than rows * width tokens never fit;
- LPT puts an example of length a on the emptiest row, whose load is at most the mean load of what
  was placed before it; so if `before + rows * a <= rows * width` holds for every example, all fit.

The second holds for any part of what it holds for, so where the largest number within the first
bound meets it, the bisection must end there. One radix sort of the window serves every run.

Longer than 300 lines: the compiled functions of one algorithm, which splitting would hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

MAX_ROW_TOKENS = 2**31 - 1
OFFSET_BITS = 32  # a key is `length << OFFSET_BITS | offset in the window`: LPT's order, descending
OFFSET_MASK = (1 << OFFSET_BITS) - 1
RADIX_BITS = 8
FITS, OPEN, TOO_MANY = 1, 0, -1

Int32s = NDArray[np.int32]
Keys = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank's row of a global batch."""

    indices: NDArray[np.int64]  # its examples, in the order in which the row was filled
    start_cursor: int  # examples consumed before this global batch
    next_cursor: int  # examples consumed once it is done


@dataclass(frozen=True, slots=True)
class EpochCount:
    """What packing an epoch comes to, over all ranks."""

    num_batches: int  # global batches
    max_row_examples: int  # the largest number of examples in any row of any rank
    final_cursor: int  # examples consumed by the last global batch
    filled_tokens: int  # tokens in all rows, padding excluded


@dataclass(frozen=True, slots=True)
class MicroRows:
    """One rank's row of a global batch, split into shorter rows; as many on every rank."""

    rows: tuple[NDArray[np.int64], ...]  # the examples of each; the last ones may be empty
    start_cursor: int
    next_cursor: int


class MultipackSampler:
    """Yields this rank's row of each global batch, from example `cursor` on.

    `lengths`: tokens that each example takes in a row, in the order of the epoch. An epoch ends
    where fewer examples than ranks are left; with `drop_last_batch` also before the global batch
    that reaches the end.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        batch_max_length: int,
        num_replicas: int,
        rank: int,
        drop_last_batch: bool,
        cursor: int = 0,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"{rank=} is not one of num_replicas={num_replicas} ranks; "
                f"use 0 to {num_replicas - 1}"
            )
        self.lengths = _checked_lengths(lengths, batch_max_length, num_replicas, cursor)
        self.batch_max_length = batch_max_length
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last_batch = drop_last_batch
        self.cursor = cursor

    def __iter__(self) -> Iterator[RankRow]:
        for part in self.in_micro_rows(self.batch_max_length):
            (indices,) = part.rows  # a row fits into a micro row of its own width
            yield RankRow(indices, part.start_cursor, part.next_cursor)

    def in_micro_rows(self, width: int) -> Iterator[MicroRows]:
        """The same global batches, each row packed first-fit into micro rows of `width` tokens.

        Every rank makes as many micro rows as the rank that needs most. ValueError for an example
        longer than `width`.
        """
        if self.lengths.max(initial=0) > width:
            longest = int(self.lengths.argmax())
            raise ValueError(
                f"example {longest} takes {self.lengths[longest]} tokens, more than "
                f"micro_batch_size={width}; make micro batches at least that long"
            )
        start = self.cursor
        while start < len(self.lengths):
            indices, bins, num_bins, used = _micro_rows(
                self.lengths, start, (self.num_replicas, self.batch_max_length), self.rank, width
            )
            stop = start + used
            if used < self.num_replicas or (self.drop_last_batch and stop == len(self.lengths)):
                return
            rows = tuple(indices[bins == number] for number in range(num_bins))
            yield MicroRows(rows, start, stop)
            start = stop


def count_epoch(
    lengths: ArrayLike,
    *,
    batch_max_length: int,
    num_replicas: int,
    drop_last_batch: bool,
    cursor: int = 0,
) -> EpochCount:
    """Counts what `MultipackSampler` yields on all ranks together, without making any of it."""
    checked = _checked_lengths(lengths, batch_max_length, num_replicas, cursor)
    counts = _count_epoch(checked, cursor, num_replicas, batch_max_length, drop_last_batch)
    return EpochCount(*counts)


def _checked_lengths(
    lengths: ArrayLike, batch_max_length: int, num_replicas: int, cursor: int
) -> Int32s:
    if not 1 <= batch_max_length <= MAX_ROW_TOKENS:
        raise ValueError(f"{batch_max_length=} must lie between 1 and {MAX_ROW_TOKENS} tokens")
    if num_replicas < 1:
        raise ValueError(f"{num_replicas=} must be at least 1: a row for every rank")
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(
            f"lengths must be a list of integers, one per example; got {array.dtype} of shape "
            f"{array.shape}"
        )
    if not 0 <= cursor <= array.size:
        raise ValueError(
            f"{cursor=} is outside this epoch of {array.size} examples; "
            f"start between 0 and {array.size}"
        )
    if array.size:
        shortest, longest = int(array.argmin()), int(array.argmax())
        if array[shortest] < 1:
            raise ValueError(
                f"example {shortest} has length {array[shortest]}, but takes at least 1 token "
                "in a row; remove it from the data"
            )
        if array[longest] > batch_max_length:
            raise ValueError(
                f"example {longest} has length {array[longest]} and does not fit into a row of "
                f"batch_max_length={batch_max_length} tokens; make rows at least that long, or "
                "cut or drop longer examples when sampling (context_size)"
            )
    # Writeable, so that numba sees one type whether or not this came from a memory map.
    return np.require(array, np.int32, ["C", "W", "E"])


@njit(cache=True, nogil=True)
def _look_ahead(lengths: Int32s, start: int, budget: int) -> tuple[int, int]:
    """How many examples from `start` on are looked at, and how many of these are within budget."""
    total = 0
    stop = start
    while stop < len(lengths) and total < budget:
        total += lengths[stop]
        stop += 1
    candidates = stop - start
    return candidates, candidates - (total > budget)


@njit(cache=True, nogil=True)
def _sorted_keys(lengths: Int32s, start: int, count: int) -> Keys:
    """Keys of the window, ascending: a radix sort by length that leaves equal ones in place."""
    keys = np.empty(count, np.int64)
    spare = np.empty(count, np.int64)
    longest = 0
    for offset in range(count):
        length = np.int64(lengths[start + offset])
        keys[offset] = length << OFFSET_BITS | offset
        longest = max(longest, length)
    length_bits = 1
    while longest >> length_bits:
        length_bits += 1
    passes = (length_bits + RADIX_BITS - 1) // RADIX_BITS
    digit_bits = (length_bits + passes - 1) // passes
    digit_mask = (1 << digit_bits) - 1
    ends = np.empty(1 << digit_bits, np.int64)
    for shift in range(OFFSET_BITS, OFFSET_BITS + passes * digit_bits, digit_bits):
        ends[:] = 0
        for key in keys:
            ends[key >> shift & digit_mask] += 1
        total = 0
        for digit in range(len(ends)):
            size = ends[digit]
            ends[digit] = total
            total += size
        for key in keys:
            digit = key >> shift & digit_mask
            spare[ends[digit]] = key
            ends[digit] += 1
        keys, spare = spare, keys
    return keys


@njit(cache=True, nogil=True)
def _judge(keys: Keys, used: int, rows: int, width: int) -> int:
    """Whether the bounds tell if LPT fits the window's first `used` examples."""
    before = 0
    needed = 0
    for position in range(len(keys) - 1, -1, -1):
        if keys[position] & OFFSET_MASK < used:
            length = keys[position] >> OFFSET_BITS
            needed = max(needed, before + rows * length)
            before += length
    if before > rows * width:
        return TOO_MANY
    return FITS if needed <= rows * width else OPEN


@njit(cache=True, nogil=True)
def _place(keys: Keys, used: int, rows: int, width: int, row_of: Int32s) -> bool:
    """Runs LPT on the window's first `used` examples; `row_of[position]` receives their rows.

    The rows form a binary min-heap, slot 1 its root. The grown root sinks, to the right only if
    that is strictly smaller, and stops at equality: on ties, the heap decides who gets what.
    """
    loads = np.zeros(2 * rows + 2, np.int64)
    loads[rows + 1 :] = MAX_ROW_TOKENS + 1  # what hangs below the last level never rises
    heap = np.arange(-1, rows)
    for position in range(len(keys) - 1, -1, -1):
        if keys[position] & OFFSET_MASK >= used:
            continue
        load = loads[1] + (keys[position] >> OFFSET_BITS)
        if load > width:
            return False
        row = heap[1]
        row_of[position] = row
        slot = 1
        while True:
            child = 2 * slot
            child += loads[child + 1] < loads[child]
            if loads[child] >= load:
                break
            loads[slot] = loads[child]
            heap[slot] = heap[child]
            slot = child
        loads[slot] = load
        heap[slot] = row
    return True


@njit(cache=True, nogil=True)
def _pack_window(lengths: Int32s, start: int, rows: int, width: int) -> tuple[Keys, Int32s, int]:
    """The next global batch: (keys, their rows, number of examples used)."""
    candidates, within = _look_ahead(lengths, start, rows * width)
    keys = _sorted_keys(lengths, start, within)
    row_of = np.empty(within, np.int32)
    if _judge(keys, within, rows, width) == FITS:
        _place(keys, within, rows, width, row_of)
        return keys, row_of, within
    low, high = 1, candidates + 1
    placed = 0
    while high - low > 1:
        middle = (low + high) // 2
        verdict = _judge(keys, middle, rows, width) if middle <= within else TOO_MANY
        if verdict == OPEN:
            placed = middle
            verdict = FITS if _place(keys, middle, rows, width, row_of) else TOO_MANY
        if verdict == FITS:
            low = middle
        else:
            high = middle
    if placed != low:
        _place(keys, low, rows, width, row_of)
    return keys, row_of, low


@njit(cache=True, nogil=True)
def _micro_rows(
    lengths: Int32s, start: int, shape: tuple[int, int], rank: int, micro_width: int
) -> tuple[NDArray[np.int64], Int32s, int, int]:
    """One rank's examples of the next global batch, their micro rows (first-fit, in the order in
    which the row was filled), the largest number of micro rows of any rank, and examples used."""
    rows, width = shape
    keys, row_of, used = _pack_window(lengths, start, rows, width)
    loads = np.zeros((rows, len(keys) + 1), np.int64)
    num_bins = np.ones(rows, np.int64)
    indices = np.empty(len(keys), np.int64)
    bins = np.empty(len(keys), np.int32)
    count = 0
    for position in range(len(keys) - 1, -1, -1):
        offset = keys[position] & OFFSET_MASK
        if offset >= used:
            continue
        row, length = row_of[position], keys[position] >> OFFSET_BITS
        number = 0
        while loads[row, number] + length > micro_width:
            number += 1
        loads[row, number] += length
        num_bins[row] = max(num_bins[row], number + 1)
        if row == rank:
            indices[count], bins[count] = start + offset, number
            count += 1
    return indices[:count], bins[:count], num_bins.max(), used


@njit(cache=True, nogil=True)
def _count_epoch(
    lengths: Int32s, cursor: int, rows: int, width: int, drop_last_batch: bool
) -> tuple[int, int, int, int]:
    """(global batches, largest number of examples in a row, final cursor, filled tokens)."""
    num_batches, max_row_examples, filled_tokens = 0, 0, 0
    row_examples = np.empty(rows, np.int64)
    while cursor < len(lengths):
        keys, row_of, used = _pack_window(lengths, cursor, rows, width)
        if used < rows or (drop_last_batch and cursor + used == len(lengths)):
            break
        row_examples[:] = 0
        for position in range(len(keys)):
            if keys[position] & OFFSET_MASK < used:
                row_examples[row_of[position]] += 1
                filled_tokens += keys[position] >> OFFSET_BITS
        num_batches += 1
        max_row_examples = max(max_row_examples, row_examples.max())
        cursor += used
    return num_batches, max_row_examples, cursor, filled_tokens
