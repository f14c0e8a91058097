"""Finds rows that are equal, token for token, by 128 bits of BLAKE2b over each.

Hashes are sorted in parts on disk, 24 bytes per row: memory holds a flag per row and one part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from data_io.row_selection import Mask, RowChunk
from data_io.tokenized_format import TokenizedSource

NUM_PARTS = 64  # by the first bits of a hash; so many files are open at once
PART_SHIFT = np.uint64(58)
HASH_BYTES = 16
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


class DuplicateFinder:
    """Takes all rows, numbered through; then tells which ones repeat an earlier one."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir()
        self._paths = [scratch / f"hashes_{part}" for part in range(NUM_PARTS)]
        self._files = [path.open("wb") for path in self._paths]
        self.num_rows = 0

    def add(self, source: TokenizedSource, chunk: RowChunk) -> None:
        """Takes the next rows, whole: what a cut leaves of them does not matter."""
        hashed = np.empty(len(chunk), HASHED)
        digests = b"".join(_digests(source, chunk))
        words = np.frombuffer(digests, "<u8").reshape(-1, 2)
        hashed["high"], hashed["low"] = words[:, 0], words[:, 1]
        hashed["row"] = np.arange(self.num_rows, self.num_rows + len(chunk))
        self.num_rows += len(chunk)
        parts = (hashed["high"] >> PART_SHIFT).astype(np.intp)
        by_part = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=NUM_PARTS))
        for file, rows in zip(self._files, np.split(hashed[by_part], ends[:-1]), strict=True):
            file.write(rows.tobytes())

    def repeated(self) -> Mask:
        """[number of rows] true where an earlier row is the same."""
        is_repeated = np.zeros(self.num_rows, np.bool_)
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            rows = np.fromfile(path, HASHED)
            order = np.lexsort((rows["row"], rows["low"], rows["high"]))
            rows = rows[order]
            same = rows["high"][1:] == rows["high"][:-1]
            same &= rows["low"][1:] == rows["low"][:-1]
            is_repeated[rows["row"][1:][same]] = True
        return is_repeated

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink()
        self.scratch.rmdir()


def _digests(source: TokenizedSource, chunk: RowChunk) -> Iterator[bytes]:
    """Of the ids, whatever integers they are stored as, and of what is not scored."""
    sizes = np.stack([chunk.inst_len, chunk.whole_resp_len], 1).astype("<u8")
    ends = sizes.sum(1, dtype=np.int64).cumsum()
    scored = None if source.scored is None else chunk.gathered(source.scored, whole=True) != 0
    told = memoryview(sizes.tobytes())
    ids = memoryview(chunk.gathered(source.tokens, whole=True).astype("<u4").tobytes())
    start = 0
    for row, end in enumerate(ends.tolist()):
        digest = hashlib.blake2b(told[16 * row : 16 * row + 16], digest_size=HASH_BYTES)
        digest.update(ids[4 * start : 4 * end])
        if scored is not None:
            is_scored = scored[end - int(chunk.whole_resp_len[row]) : end]
            if not is_scored.all():
                digest.update(is_scored.tobytes())
        yield digest.digest()
        start = end
