"""Tensors in torch.distributed.checkpoint folders, written at one world size and read at any.

Reading is safe with files from strangers: a folder's `.metadata` is a pickle, so it goes through an
unpickler that admits only the classes such a file consists of, and entries that are no tensors
(pickles too) are never loaded.
"""

from __future__ import annotations

import pickle
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA_FILE = ".metadata"
_ADMITTED = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}

# What unpickling raises for files that are missing, cut, changed, or something else.
_DAMAGED = (
    *(OSError, EOFError, pickle.UnpicklingError, AttributeError, LookupError, TypeError),
    *(MemoryError, OverflowError, RuntimeError, UnicodeDecodeError),
)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes this rank's parts; every rank of the run calls it with the same names.

    OSError on every rank where one of them could not write.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    with _quiet(), _plain_errors(OSError, f"{folder} cannot be written"):
        dcp.save(dict(tensors), storage_writer=writer, no_dist=_is_alone())


def read_tensors_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites `tensors` in place (shards included); ValueError where names or shapes differ."""
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
    reader = _SafeReader(folder)
    with _quiet(), _plain_errors(ValueError, f"{folder} cannot be read"):
        dcp.load(
            dict(tensors), storage_reader=reader, planner=_TensorPlanner(), no_dist=_is_alone()
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whole, on CPU; on this process alone."""
    reader = _SafeReader(folder)
    entries = _tensor_entries(reader.read_metadata())
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


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePosixPath  # where the folder once was: a text like any other
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ADMITTED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(
            f"the checkpoint's metadata asks for {module}.{name}, which no tensor needs; "
            "it may be malicious and was not loaded"
        )


class _SafeReader(dcp.FileSystemReader):
    """A file reader whose metadata goes through the restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            _tensor_entries(metadata)
        except _DAMAGED as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint's metadata: {error}"
            ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = str(uuid.uuid4())
        return metadata


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
