"""Tensors in torch.distributed.checkpoint folders, written at one world size and read at any.

Reading is safe with files from strangers: a folder's `.metadata`, a pickle, is read by
`training.safe_metadata`, and entries that are no tensors (pickles too) are never loaded.
"""

from __future__ import annotations

import io
import math
import os
import sys
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from training.safe_metadata import DAMAGED, load_metadata
from training.sent_pieces import StoredPiece, exchange, is_there

METADATA_FILE = ".metadata"
PIECE_BYTES = 1 << 22  # of a tensor are in memory at a time while it is read


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes this rank's parts; every rank of the run calls it with the same names.

    OSError on every rank where one of them could not write.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    with _quiet(), _plain_errors(OSError, f"{folder} cannot be written"):
        dcp.save(dict(tensors), storage_writer=writer, no_dist=_is_alone())


def read_tensors_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites `tensors` in place (shards included); ValueError where names or shapes differ.

    They may be of another type or on another device: values are converted some at a time, so that
    hardly any memory is needed beside `tensors`.
    """
    stored = tensor_shapes(folder)
    missing = sorted(set(tensors) - set(stored))
    if missing:
        raise ValueError(
            f"{folder} has no tensor {missing[0]!r} ({len(missing)} are missing); it belongs to "
            "another architecture or was written with other optimizer settings"
        )
    for name, tensor in tensors.items():
        if stored[name] != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(stored[name])}, the model wants "
                f"{list(tensor.shape)}; the architecture or the vocabulary differs"
            )
    reader = _SafeReader(folder, asks_others=not _is_alone())
    with _quiet(), _plain_errors(ValueError, f"{folder} cannot be read"):
        dcp.load(
            dict(tensors), storage_reader=reader, planner=_TensorPlanner(), no_dist=_is_alone()
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole, on CPU; on this process alone."""
    reader = _SafeReader(folder)
    entries = _tensor_entries(reader.read_metadata())
    _require_bytes(folder, entries)
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in entries.items()}
    with _quiet(), _plain_errors(ValueError, f"{folder} cannot be read"):
        dcp.load(tensors, storage_reader=reader, planner=_TensorPlanner(), no_dist=True)
    return tensors


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a folder."""
    entries = _tensor_entries(_SafeReader(folder).read_metadata())
    return {name: size for name, (size, _) in entries.items()}


def _tensor_entries(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _require_bytes(folder: Path, entries: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Refuses tensors that are larger than their files, before there is memory for them."""
    num_bytes = sum(math.prod(size) * dtype.itemsize for size, dtype in entries.values())
    there = sum(file.stat().st_size for file in folder.iterdir())
    if num_bytes > there or any(length < 0 for size, _ in entries.values() for length in size):
        raise ValueError(
            f"{folder} cannot be read: its {METADATA_FILE} tells of tensors of {num_bytes:,} "
            f"bytes, the files beside it have {there:,}"
        )


class _SafeReader(dcp.FileSystemReader):
    """A file reader whose metadata goes through the restricted unpickler.

    `asks_others`: all ranks read, and what lies on another node's disk is sent by one that sees it.
    """

    def __init__(self, folder: Path, *, asks_others: bool = False) -> None:
        super().__init__(folder)
        self._asks_others = asks_others

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        try:
            metadata = load_metadata(path.read_bytes())
            _tensor_entries(metadata)
            _require_files_beside(path, metadata)
        except DAMAGED as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint's metadata: {error}"
            ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = str(uuid.uuid4())
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        staging = torch.empty(PIECE_BYTES, dtype=torch.uint8)  # one for all: freed ones pile up
        folder, elsewhere = Path(self.path), dict[StoredPiece, list[ReadItem]]()

        def piece_of(item: ReadItem) -> StoredPiece:
            where = self.storage_data[item.storage_index]
            return StoredPiece(where.relative_path, where.offset, where.length)

        def copy(item: ReadItem, part: _FilePart) -> None:
            target = planner.resolve_tensor(item).detach()
            _StoredTensor.find(part).copy_into(target, item.storage_offsets, staging)
            planner.commit_tensor(item, target)

        def copy_sent(piece: StoredPiece, content: bytes) -> None:
            for item in elsewhere[piece]:
                copy(item, _FilePart(io.BytesIO(content), 0, piece.length))

        if self._asks_others:
            for item in plan.items:
                if not is_there(folder / piece_of(item).file):
                    elsewhere.setdefault(piece_of(item), []).append(item)
            exchange(folder, elsewhere, copy_sent)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO())
            elif (piece := piece_of(item)) not in elsewhere:
                with (folder / piece.file).open("rb") as file:
                    copy(item, _FilePart(file, piece.start, piece.length))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _require_files_beside(path: Path, metadata: Metadata) -> None:
    for where in metadata.storage_data.values():
        if PurePosixPath(where.relative_path).name != where.relative_path:
            raise ValueError(
                f"{path} places a tensor in {where.relative_path!r}, which is no file beside it; "
                "it may be malicious and was not loaded"
            )


class _FilePart(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file."""

    def __init__(self, file: BinaryIO | io.BytesIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """A tensor as `torch.save` wrote it: a zip archive whose entry data/... has its values."""

    part: _FilePart
    description: Tensor  # on the meta device: shape, strides and type
    values_at: int | None  # where its values begin; None: they do not lie there row after row

    @classmethod
    def find(cls, part: _FilePart) -> _StoredTensor:
        description = torch.load(cast(IO[bytes], part), map_location="meta", weights_only=True)
        with zipfile.ZipFile(part) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        values = [entry for name, entry in entries.items() if name.startswith("data/")]
        is_plain = len(values) == 1 and values[0].compress_type == zipfile.ZIP_STORED
        is_plain &= order.decode() == sys.byteorder and description.is_contiguous()
        if not is_plain:
            return cls(part, description, None)
        # Before an entry's values come 30 bytes, its name and some padding.
        part.seek(values[0].header_offset + 26)
        name_bytes, padding = (int.from_bytes(part.read(2), "little") for _ in range(2))
        before = description.storage_offset() * description.element_size()
        return cls(part, description, values[0].header_offset + 30 + name_bytes + padding + before)

    def copy_into(self, target: Tensor, offsets: Sequence[int], staging: Tensor) -> None:
        """The values from `offsets` on in each dimension to all of `target`, by way of `staging`.

        `staging` is bytes, as many as are in memory at a time (or one row, if that is more).
        """
        if self.values_at is None or not self.description.dim():
            self.part.seek(0)
            stored = torch.load(cast(IO[bytes], self.part), map_location="cpu", weights_only=True)
            target.copy_(_narrowed(stored, offsets, target.shape))
            return
        if not target.numel():
            return
        row_bytes = self.description[:1].nbytes
        if row_bytes > len(staging):
            staging = torch.empty(row_bytes, dtype=torch.uint8)
        step = len(staging) // row_bytes
        for first in range(0, len(target), step):
            rows = target[first : first + step]
            piece = staging[: len(rows) * row_bytes]
            self._read(piece, self.values_at + (offsets[0] + first) * row_bytes)
            values = piece.view(self.description.dtype).view(-1, *self.description.shape[1:])
            rows.copy_(_narrowed(values, (0, *offsets[1:]), rows.shape))

    def _read(self, into: Tensor, start: int) -> None:
        self.part.seek(start)
        left = into.numpy().data
        while left:
            count = self.part.readinto(left)
            if not count:
                raise ValueError("the file ends in the middle of a tensor")
            left = left[count:]


def _narrowed(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


class _TensorPlanner(dcp.DefaultLoadPlanner):
    """Loads tensors alone."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor; it is never loaded")


@contextmanager
def _plain_errors(kind: type[ValueError | OSError], message: str) -> Iterator[None]:
    """The library's own exception is no Exception, and prints a traceback from each rank."""
    try:
        yield
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise kind(f"{message}: {cause}") from error


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on single-process use, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield
