"""Writes tokenized folders: streamed, and published whole or not at all.

Owns the writing side of `data_io.tokenized_format`; which rows go in is the caller's business.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib.format import write_array_header_1_0

from data_io.sampled_format import INDEX_NAMES, IntArray
from data_io.tokenized_format import CHUNK, MADE_FILE, METADATA_FILE, MadeBy

LOCK_FILE = ".lock"
LEFTOVERS = re.compile(r"\..*\.(partial(-[0-9a-f]+)?|replaced|position)")  # hidden names


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One run at a time writes to a folder; what is half-made there goes, before and after."""
    with (root / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {root}; wait for it, or choose another output"
            ) from None
        _clear_leftovers(root)
        try:
            yield
        finally:
            _clear_leftovers(root)


def _clear_leftovers(root: Path) -> None:
    """A worker that outlives its run for a moment loses its folder, and publishes nothing."""
    for path in root.glob(".*"):
        if LEFTOVERS.fullmatch(path.name):
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Takes a source's folder away; stopped half-way, what is left does not look like one."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)


class TokenizedWriter:
    """The folder of one source in the making, in `staging` until `publish`.

    Leaving the block without it leaves no trace.
    """

    def __init__(self, folder: Path, *, token_type: np.dtype[Any], scored: bool = False) -> None:
        self.folder = folder
        self.staging = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(8)}")
        self.staging.mkdir(parents=True)
        index_type = np.dtype(np.uint64)
        self._columns = {
            name: _GrowingArray(self.staging / f"{name}.npy", index_type) for name in INDEX_NAMES
        }
        self._tokens = _GrowingArray(self.staging / "tokens.npy", token_type)
        self._scored: _GrowingArray | None = None
        if scored:
            self._start_scored()

    @property
    def num_rows(self) -> int:
        return self._columns["inst_len"].size

    @property
    def num_tokens(self) -> int:
        return self._tokens.size

    def add(
        self, ids: IntArray, inst_lens: IntArray, resp_lens: IntArray, scored: IntArray | None
    ) -> None:
        """Appends rows whose ids follow one another: instruction, response, instruction...

        `scored` has a value per id; with None all of it counts. scored.npy is there from the first
        rows on that have one.
        """
        inst_lens, resp_lens = inst_lens.astype(np.uint64), resp_lens.astype(np.uint64)
        ends = np.cumsum(inst_lens + resp_lens, dtype=np.uint64) + np.uint64(self.num_tokens)
        if scored is not None and self._scored is None:
            self._start_scored()
        if self._scored is not None:
            self._scored.append(np.ones(len(ids), np.uint8) if scored is None else scored)
        self._tokens.append(ids)
        resp_starts = ends - resp_lens
        for name, values in zip(
            INDEX_NAMES, (resp_starts - inst_lens, inst_lens, resp_starts, resp_lens), strict=True
        ):
            self._columns[name].append(values)

    def publish(self, metadata: Mapping[str, Any], made: MadeBy) -> None:
        """Replaces the folder, if there is one."""
        self._close()
        (self.staging / METADATA_FILE).write_text(json.dumps(metadata) + "\n", encoding="utf-8")
        told = made.model_dump_json(indent=1, exclude_defaults=True)
        (self.staging / MADE_FILE).write_text(told + "\n", encoding="utf-8")
        for path in (*self.staging.iterdir(), self.staging):
            _sync(path)
        remove_folder(self.folder)
        self.staging.rename(self.folder)
        _sync(self.folder.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _start_scored(self) -> None:
        self._scored = _GrowingArray(self.staging / "scored.npy", np.dtype(np.uint8))
        for at in range(0, self.num_tokens, CHUNK):
            self._scored.append(np.ones(min(CHUNK, self.num_tokens - at), np.uint8))

    def _close(self) -> None:
        for array in (*self._columns.values(), self._tokens, self._scored):
            if array is not None:
                array.close()


class _GrowingArray:
    """A .npy file that grows; numpy pads its headers, so that the last fits over the first."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype, self.size = dtype, 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        write_array_header_1_0(self._file, header)

    def append(self, values: IntArray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.size += len(values)

    def close(self) -> None:
        if self._file.closed:
            return
        with self._file:
            self._file.seek(0)
            self._write_header()


def _sync(path: Path) -> None:
    """What a rename publishes must be on disk before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
