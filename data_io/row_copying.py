"""Copies the rows that epochs use into a sampled folder, and writes the epochs over them.

A row's instruction and response come to lie side by side, cut-off tokens and unused rows are left
out. Tokens are read through memory maps; what stays in memory are 16 bytes per usable row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_io.epoch_drawing import Drawn, RowNumbers
from data_io.row_selection import Int64s, Mask, RowChunk, UsableRows, usable_chunks
from data_io.sampled_format import EpochIndex
from data_io.sampled_writer import SampledWriter
from data_io.sampling_report import Amount, Coverage
from data_io.tokenized_format import TokenizedSource

ROW_PLACE = np.dtype([("start", np.int64), ("inst_len", np.int32), ("resp_len", np.int32)])
CHUNK = 2**16  # examples of an epoch that are written together


@dataclass(frozen=True, slots=True)
class Endings:
    """How responses end that are cut to fit."""

    keep_eoa: bool
    eoa_id: int | None = None  # None: no tokenizer tells it; then whatever ends the whole response

    def of_cut(self, source: TokenizedSource, chunk: RowChunk) -> tuple[Mask, Int64s]:
        """(which rows [n] get their last token back, where in tokens.npy that is)."""
        last = chunk.resp_start + chunk.whole_resp_len - 1
        wanted = self.keep_eoa & (chunk.resp_len < chunk.whole_resp_len)
        if self.eoa_id is not None:
            wanted[wanted] = source.tokens[last[wanted]] == self.eoa_id
        return wanted, last[wanted]


class RowCopier:
    """Where the rows of all sources lie in the sampled folder, once they are copied."""

    def __init__(self, writer: SampledWriter, num_rows: int, endings: Endings) -> None:
        self.writer, self.endings = writer, endings
        self.has_scored = writer.metadata.scored
        self._places = np.zeros(num_rows, ROW_PLACE)

    def copy(
        self, source: TokenizedSource, rows: UsableRows, used: Mask | None, first: int
    ) -> None:
        """Copies the rows that are `used` (None: all); the source's are numbered from `first`."""
        for chunk in usable_chunks(source, rows):
            part = slice(chunk.first, chunk.first + len(chunk))
            wanted = None if used is None else used[part]
            if len(taken := chunk.only(wanted)):
                places = self._places[first + part.start : first + part.stop]
                places[slice(None) if wanted is None else wanted] = self._append(source, taken)

    def epoch(self, order: RowNumbers) -> Iterator[EpochIndex]:
        """The examples of an epoch in the given order, some at a time."""
        for at in range(0, len(order), CHUNK):
            places = self._places.take(order[at : at + CHUNK])
            inst_len = places["inst_len"]
            yield EpochIndex(
                inst_start=places["start"],
                inst_len=inst_len,
                resp_start=places["start"] + inst_len,
                resp_len=places["resp_len"],
            )

    def _append(self, source: TokenizedSource, chunk: RowChunk) -> NDArray[np.void]:
        """Writes the rows one after another; returns their places [n]."""
        ends = np.cumsum(chunk.inst_len + chunk.resp_len)
        gets_end, last = self.endings.of_cut(source, chunk)
        ids, scored = chunk.gathered(source.tokens), None
        ids[ends[gets_end] - 1] = source.tokens[last]
        if self.has_scored and source.scored is None:
            scored = np.ones(len(ids), np.uint8)
        elif self.has_scored and source.scored is not None:
            scored = chunk.gathered(source.scored).astype(np.uint8, copy=False)
            scored[ends[gets_end] - 1] = source.scored[last]
        try:
            start = self.writer.add_tokens(ids, scored)
        except ValueError as error:
            raise ValueError(f"{source.folder / 'tokens.npy'}: {error}") from None
        places = np.empty(len(chunk), ROW_PLACE)
        places["start"] = start + ends - chunk.inst_len - chunk.resp_len
        places["inst_len"], places["resp_len"] = chunk.inst_len, chunk.resp_len
        return places


def coverage(source: TokenizedSource, rows: UsableRows, drawn: Drawn) -> Coverage:
    """How much of a source there is to use, and what the epochs have of it."""
    usable, once_more = Amount(), Amount()
    for chunk in usable_chunks(source, rows):
        usable += _amount(chunk)
        if drawn.once_more is not None:
            part = slice(chunk.first, chunk.first + len(chunk))
            once_more += _amount(chunk.only(drawn.once_more[part]))
    unique = usable if drawn.rounds else once_more
    return Coverage(rows.name, usable, usable * drawn.rounds + once_more, unique)


def _amount(chunk: RowChunk) -> Amount:
    return Amount(len(chunk), int(chunk.inst_len.sum()), int(chunk.resp_len.sum()))
