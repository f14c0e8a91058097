"""Which rows the epochs take, and in which order: the published draws, number for number.

One Philox generator drives everything. Epoch by epoch, source by source, rows come from a running
permutation of the source, a new one whenever it is used up; then the whole epoch is shuffled. To
shuffle 0..n-1 in place gives `Generator.permutation(n)`, whatever integers they are stored as.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RowNumbers = NDArray[np.signedinteger[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the epochs took of one source: every row `rounds` times, and some once more."""

    rounds: int
    once_more: Mask | None  # per row; None: no row

    @property
    def used(self) -> Mask | None:
        """Per row, whether any epoch has it; None: all rows."""
        return None if self.rounds else self.once_more


class SourceDraws:
    """The running permutation of a source's rows; only what is left of it is kept."""

    def __init__(self, first: int, num_rows: int, dtype: np.dtype[Any]) -> None:
        self.first, self.num_rows, self.dtype = first, num_rows, dtype
        self.rounds = 0  # permutations used up
        self._left: RowNumbers = np.empty(0, dtype)  # of the running permutation

    def draw(self, generator: np.random.Generator, into: RowNumbers) -> None:
        """Fills `into` with the next rows, numbered from `first` on."""
        filled = 0
        while filled < len(into):
            if not len(self._left) and len(into) - filled >= self.num_rows:
                whole = into[filled : filled + self.num_rows]  # a permutation that is used at once
                whole[:] = self._in_order()
                generator.shuffle(whole)
                self.rounds += 1
                filled += self.num_rows
                continue
            if not len(self._left):
                self._left = self._in_order()
                generator.shuffle(self._left)
            count = min(len(into) - filled, len(self._left))
            into[filled : filled + count] = self._left[:count]
            filled += count
            self._left = self._left[count:]
            self.rounds += not len(self._left)

    def drawn(self) -> Drawn:
        """What was drawn so far."""
        return Drawn(self.rounds, self._all_but(self._left) if len(self._left) else None)

    def used_after(self, count: int) -> Mask | None:
        """Per row, whether it was drawn or is within the next `count` rows; None: all rows."""
        if self.rounds or count >= len(self._left):
            return None
        return self._all_but(self._left[count:])

    def _all_but(self, rows: RowNumbers) -> Mask:
        mask = np.ones(self.num_rows, np.bool_)
        mask[rows - self.first] = False
        return mask

    def _in_order(self) -> RowNumbers:
        return np.arange(self.first, self.first + self.num_rows, dtype=self.dtype)


class EpochDraws:
    """Draws the epochs of several sources, whose rows are numbered through."""

    def __init__(self, num_rows: Sequence[int], rows_per_epoch: Sequence[int], seed: int) -> None:
        """Of each source: how many rows it has, and how many an epoch takes."""
        firsts = np.cumsum([0, *num_rows])
        self.num_rows = int(firsts[-1])
        self.dtype = np.dtype(np.int32 if self.num_rows < 2**31 else np.int64)
        self.rows_per_epoch = tuple(rows_per_epoch)
        self.sources = [
            SourceDraws(int(first), count, self.dtype)
            for first, count in zip(firsts[:-1], num_rows, strict=True)
        ]
        self._generator = np.random.Generator(np.random.Philox(seed=seed))

    def epochs(self, count: int) -> Iterator[RowNumbers]:
        """The rows of each epoch in the order of training."""
        ends = np.cumsum(self.rows_per_epoch)
        for _ in range(count):
            order = np.empty(int(ends[-1]), self.dtype)
            for source, wanted, end in zip(self.sources, self.rows_per_epoch, ends, strict=True):
                source.draw(self._generator, order[end - wanted : end])
            self._generator.shuffle(order)
            yield order
            del order  # before the next one is made
