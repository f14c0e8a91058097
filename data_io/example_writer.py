"""Examples into a sampled folder: tokens as they come, then epochs, each in an order of its own."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from data_io.examples import Example
from data_io.sampled_format import EpochIndex
from data_io.sampled_writer import SampledWriter


class ExampleWriter:
    """Fills a `SampledWriter` that was made with `scored=True`; 32 bytes of memory an example.

    scored.npy stays only where a token of some response does not count.
    """

    def __init__(self, writer: SampledWriter) -> None:
        self.writer = writer
        self._inst_start, self._inst_len = array("q"), array("q")
        self._resp_start, self._resp_len = array("q"), array("q")
        self._is_masked = False

    def __len__(self) -> int:
        return len(self._inst_len)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[n] tokens of each example."""
        return np.array(self._inst_len) + np.array(self._resp_len)

    def add(self, examples: Sequence[Example]) -> None:
        """Appends them, each prefix before its response."""
        if not examples:
            return
        ids = chain.from_iterable(chain(each.inst_ids, each.resp_ids) for each in examples)
        scored = chain.from_iterable(map(_scored, examples))
        counts = [len(each) for each in examples]
        start = self.writer.add_tokens(
            np.fromiter(ids, np.int64, sum(counts)), np.fromiter(scored, np.uint8, sum(counts))
        )
        for example, count in zip(examples, counts, strict=True):
            self._is_masked |= example.scored is not None
            self._inst_start.append(start)
            self._inst_len.append(len(example.inst_ids))
            self._resp_start.append(start + len(example.inst_ids))
            self._resp_len.append(len(example.resp_ids))
            start += count

    def finish(self, orders: Iterable[NDArray[np.int64]]) -> None:
        """Writes an epoch for each order, which names examples by their numbers."""
        columns = [
            np.array(column)
            for column in (self._inst_start, self._inst_len, self._resp_start, self._resp_len)
        ]
        if not self._is_masked:
            self.writer.drop_scored()
        for order in orders:
            self.writer.add_epoch(EpochIndex(*(column[order] for column in columns)))


def _scored(example: Example) -> Iterable[int]:
    response = example.scored if example.scored is not None else [1] * len(example.resp_ids)
    return chain([1] * len(example.inst_ids), response)
