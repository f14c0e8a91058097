"""Writes a sampled folder: streamed, checked, and published whole or not at all.

    with SampledWriter(folder, tokenizer_info, max_seq_len=4097) as writer:
        offset = writer.add_tokens(ids)
        writer.add_epoch(EpochIndex(...))

Owns the writing side of `data_io.sampled_format`; which examples go in is the caller's business.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from data_io.sampled_format import (
    INDEX_NAMES,
    EpochIndex,
    IntArray,
    SampledMetadata,
    TokenizerInfo,
)
from data_io.staging import Staging

UINT16_VOCAB = 65_536

TokenType = np.dtype[np.integer[Any]]


def token_dtype(vocab_size: int) -> TokenType:
    """The smallest of the types that the published loader and ours both read."""
    return np.dtype(np.uint16 if vocab_size <= UINT16_VOCAB else np.int32)


class SampledWriter:
    """A sampled folder in the making, beside its final place until everything is there.

    `staging` is that place: further files, such as tokenizer.json, may be put there. `overwrite`
    replaces an earlier sampled folder, and never a folder that holds anything else.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer_info: TokenizerInfo,
        *,
        max_seq_len: int,
        scored: bool = False,
        dtype: TokenType | None = None,
        overwrite: bool = False,
    ) -> None:
        self.metadata = SampledMetadata(
            tokenizer_info=tokenizer_info, max_seq_len=max_seq_len, total_length=0, scored=scored
        )
        self.folder, self.overwrite = Path(folder).absolute(), overwrite
        self._require_free()
        self._aside = Staging(self.folder)
        self.staging = self._aside.path
        dtype = dtype or token_dtype(self.metadata.id_limit)
        self._tokens = _GrowingArray(self.staging / "tokens.npy", dtype)
        uint8 = np.dtype(np.uint8)
        self._scored = _GrowingArray(self.staging / "scored.npy", uint8) if scored else None
        self._epoch_tokens: list[int] = []

    def _require_free(self) -> None:
        parts = ("metadata.json", "tokens.npy", "epoch_0")
        replaceable = self.overwrite and all((self.folder / part).exists() for part in parts)
        if self.folder.is_dir():
            is_in_the_way = any(self.folder.iterdir()) and not replaceable
        else:
            is_in_the_way = self.folder.exists()
        if is_in_the_way:
            raise ValueError(
                f"{self.folder} exists and is not empty; choose another folder, or overwrite it if "
                "it holds sampled data (only such a folder is ever replaced)"
            )

    def add_tokens(self, ids: IntArray, scored: NDArray[np.uint8] | None = None) -> int:
        """Appends ids, and with `scored` data which of them count; returns where they start."""
        limit = min(self.metadata.id_limit, np.iinfo(self._tokens.dtype).max + 1)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} are not all in 0..{limit - 1} "
                f"(vocab_size={self.metadata.id_limit}, stored as {self._tokens.dtype}); "
                "use the tokenizer that the folder is written for"
            )
        if (scored is None) != (self._scored is None) or (
            scored is not None and len(scored) != len(ids)
        ):
            raise ValueError("give `scored`, one value per id, exactly where the writer has scored")
        offset = self._tokens.size
        self._tokens.append(ids)
        if self._scored is not None and scored is not None:
            self._scored.append(scored)
        return offset

    def add_epoch(self, index: EpochIndex) -> None:
        """Writes the next epoch; its tokens must have been added."""
        self.add_epoch_in_parts([index])

    def add_epoch_in_parts(self, parts: Iterable[EpochIndex]) -> None:
        """Writes the next epoch without holding it: its examples come some at a time."""
        place = self.staging / f"epoch_{len(self._epoch_tokens)}"
        place.mkdir(exist_ok=True)
        int64 = np.dtype(np.int64)
        columns = {name: _GrowingArray(place / f"{name}.npy", int64) for name in INDEX_NAMES}
        total = 0
        try:
            for part in parts:
                part.check(place, self._tokens.size, self.metadata.max_seq_len)
                for name, column in columns.items():
                    column.append(getattr(part, name))
                total += int(part.inst_len.sum(dtype=np.int64) + part.resp_len.sum(dtype=np.int64))
        finally:
            for column in columns.values():
                column.close()
        self._epoch_tokens.append(total)

    def drop_scored(self) -> None:
        """Leaves scored.npy out; for data of which every response turned out to count whole."""
        assert self._scored is not None
        self._scored.close()
        (self.staging / "scored.npy").unlink()
        self._scored = None
        self.metadata = self.metadata.model_copy(update={"scored": False})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._tokens.close()
            if self._scored is not None:
                self._scored.close()
            if kind is None:
                self._publish()
        finally:
            self._aside.close()

    def _publish(self) -> None:
        if not self._epoch_tokens:
            raise ValueError(f"{self.folder}: no epoch was added; add at least one")
        mean = round(sum(self._epoch_tokens) / len(self._epoch_tokens))
        metadata = {
            "tokenizer_info": self.metadata.tokenizer_info.model_dump(exclude_none=True),
            "vocab_size": None,
            "max_seq_len": self.metadata.max_seq_len,
            "total_length": mean,
            **({"scored": True} if self.metadata.scored else {}),
        }
        text = json.dumps(metadata, ensure_ascii=False)
        (self.staging / "metadata.json").write_text(text + "\n", encoding="utf-8")
        for path in sorted(self.staging.rglob("*"), reverse=True):
            _sync(path)
        _sync(self.staging)
        self._require_free()  # another run may have been faster
        replaced = self.staging.with_suffix(f".replaced-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(replaced)
        self.staging.rename(self.folder)
        _sync(self.folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)


class _GrowingArray:
    """A .npy file that grows; numpy pads its headers, so that the last fits over the first."""

    def __init__(self, path: Path, dtype: TokenType) -> None:
        self.dtype = dtype
        self.size = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        write_array_header_1_0(self._file, header)

    def append(self, values: NDArray[np.integer]) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.size += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()


def _sync(path: Path) -> None:
    """What a rename publishes must be on disk before it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
