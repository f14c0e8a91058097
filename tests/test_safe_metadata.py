"""Metadata of checkpoints from strangers changes nothing here, and takes no more than it has."""

from __future__ import annotations

import pickle
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from mutation_cases import PICKLES
from torch.distributed.checkpoint.metadata import StorageMeta

from training.safe_metadata import DAMAGED, load_metadata
from training.tensor_store import METADATA_FILE, read_tensors, tensor_shapes, write_tensors

REFUSED = (ValueError, *DAMAGED)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def changing(module: str, name: str) -> bytes:
    """A pickle that sets `__init__` of a class to 3."""
    state = b"N}" + text("__init__") + b"K\x03s\x86b"
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + state + b"."


def test_a_class_is_left_as_it_is() -> None:
    whole, content = StorageMeta.__init__, changing(StorageMeta.__module__, "StorageMeta")
    with pytest.raises(ValueError, match=r"changes StorageMeta.__init__; it may be malicious"):
        load_metadata(content)
    assert StorageMeta.__init__ is whole and StorageMeta("x").checkpoint_id == "x"


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch", "Size"), ("pathlib", "PosixPath"), ("torch.serialization", "_get_layout")],
)
def test_nothing_else_is_changed_either(module: str, name: str) -> None:
    whole = getattr(sys.modules[module], name).__init__
    with pytest.raises(REFUSED):
        assert load_metadata(changing(module, name)) is None
    assert getattr(sys.modules[module], name).__init__ == whole


@pytest.mark.parametrize("content", PICKLES, ids=range(len(PICKLES)))
def test_what_is_claimed_takes_neither_memory_nor_time(content: bytes) -> None:
    started_at = time.process_time()
    with suppress(*REFUSED):  # None, {} and the like are refused by read_metadata
        load_metadata(content)
    assert time.process_time() - started_at < 2  # 2**28 places of a memo take longer


def test_a_memo_beyond_the_file_is_refused() -> None:
    content = b"\x80\x04Nr" + struct.pack("<I", 100) + b"."
    with pytest.raises(pickle.UnpicklingError, match="numbers an object 100, more than it has byt"):
        load_metadata(content)


@pytest.mark.parametrize("size", [(2**40,), (10**9, 10), (-1,)], ids=str)
def test_a_tensor_larger_than_its_file_takes_no_memory(size: tuple[int], tmp_path: Path) -> None:
    write_tensors(tmp_path / "store", {"weight": torch.ones(2)})
    metadata = dcp.FileSystemReader(tmp_path / "store").read_metadata()
    metadata.state_dict_metadata["weight"].size = torch.Size(size)  # type: ignore[union-attr]
    (tmp_path / "store" / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    assert tensor_shapes(tmp_path / "store") == {"weight": torch.Size(size)}
    with pytest.raises(ValueError, match="bytes, the files beside it have"):
        read_tensors(tmp_path / "store")
