"""Tensors come back as they were written, and nothing in a stored folder is ever executed."""

from __future__ import annotations

import os
import pickle
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from training import tensor_store
from training.tensor_store import (
    METADATA_FILE,
    read_tensors,
    read_tensors_into,
    tensor_shapes,
    write_tensors,
)


def some_tensors() -> dict[str, Tensor]:
    return {
        "weight": torch.randn(5, 3),
        "buffer": torch.randn(4).bfloat16(),
        "exp_avg.weight": torch.randn(3, 5).T,  # not contiguous
        "step.weight": torch.tensor(7.0),
        "counts": torch.arange(6).view(2, 3),
        "empty": torch.empty(0, 3),
    }


def written(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    write_tensors(folder, some_tensors() if tensors is None else tensors)
    return folder


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("*.distcp")
    return file


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    found = read_tensors(written(tmp_path / "store", tensors))
    assert found.keys() == tensors.keys()
    torch.testing.assert_close(found, tensors, atol=0, rtol=0)


def test_reading_into_tensors_overwrites_them_in_place(tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = written(tmp_path / "store", tensors)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    before = {name: tensor.data_ptr() for name, tensor in wanted.items()}
    read_tensors_into(folder, wanted)
    torch.testing.assert_close(wanted, tensors, atol=0, rtol=0)
    assert {name: tensor.data_ptr() for name, tensor in wanted.items()} == before


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    wanted = {"buffer": torch.zeros(4).bfloat16()}
    read_tensors_into(written(tmp_path / "store", tensors), wanted)
    torch.testing.assert_close(wanted["buffer"], tensors["buffer"], atol=0, rtol=0)


@pytest.mark.parametrize("piece_bytes", [1, 16, 1 << 20])
def test_values_are_converted_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(tensor_store, "PIECE_BYTES", piece_bytes)
    tensors = {**some_tensors(), "nothing": torch.empty(2, 0), "part": torch.randn(9, 4)[3:7]}
    folder = written(tmp_path / "store", tensors)
    wanted = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in tensors.items()}
    wanted["weight"] = torch.zeros(5, 3, dtype=torch.bfloat16)
    read_tensors_into(folder, wanted)
    for name, tensor in tensors.items():
        assert torch.equal(wanted[name], tensor.to(wanted[name].dtype)), name


def test_a_tensor_in_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "store", {"weight": torch.ones(2)})
    data_file(folder).rename(tmp_path / "elsewhere.distcp")
    metadata = dcp.FileSystemReader(folder).read_metadata()
    for where in metadata.storage_data.values():
        where.relative_path = "../elsewhere.distcp"
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"in '../elsewhere.distcp', which is no file beside it"):
        read_tensors(folder)


def test_names_and_shapes_are_known_without_the_data(tmp_path: Path) -> None:
    folder = written(tmp_path / "store")
    data_file(folder).unlink()
    assert tensor_shapes(folder) == {name: t.shape for name, t in some_tensors().items()}


def test_tensors_that_are_not_stored_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "store", {"weight": torch.ones(2)})
    wanted = {"weight": torch.zeros(2), "bias": torch.zeros(2), "more": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no tensor 'bias' \(2 are missing\).*architecture"):
        read_tensors_into(folder, wanted)
    assert not wanted["weight"].any()


def test_another_shape_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "store", {"weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"weight has shape \[2, 3\], the model wants \[3, 2\]"):
        read_tensors_into(folder, {"weight": torch.zeros(3, 2)})


def global_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls `module.name(argument)`."""

    def text(value: str) -> bytes:
        return b"\x8c" + struct.pack("B", len(value)) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


class Payload:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {shlex.quote(str(marker))}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("os", "system"),
        ("subprocess", "getoutput"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "serialization.os.system"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("pathlib", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_metadata_that_calls_a_function_is_refused(tmp_path: Path, module: str, name: str) -> None:
    folder, marker = written(tmp_path / "store"), tmp_path / "marker"
    call = global_call(module, name, Payload(marker).command)
    (folder / METADATA_FILE).write_bytes(call)
    for read in (read_tensors, tensor_shapes, lambda it: read_tensors_into(it, some_tensors())):
        with pytest.raises(ValueError, match=rf"{module}.{name}.*may be malicious"):
            read(folder)
    assert not marker.exists()


def test_the_refused_call_would_have_been_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    call = global_call("os", "system", Payload(marker).command)
    pickle.loads(call)  # noqa: S301 -- shows that the payload of the tests here works
    assert marker.exists()


def test_a_call_inside_otherwise_sound_metadata_is_refused(tmp_path: Path) -> None:
    folder, marker = written(tmp_path / "store"), tmp_path / "marker"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.planner_data = Payload(marker)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="may be malicious"):
        read_tensors(folder)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_entries_that_are_no_tensors_are_never_loaded(tmp_path: Path) -> None:
    folder, marker = tmp_path / "store", tmp_path / "marker"
    entries = {"weight": torch.ones(2), "param_groups": Payload(marker)}
    dcp.save(entries, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    assert read_tensors(folder).keys() == tensor_shapes(folder).keys() == {"weight"}
    with pytest.raises(ValueError, match="no tensor 'param_groups'"):
        read_tensors_into(folder, {"param_groups": torch.ones(2)})
    assert not marker.exists()


def test_a_call_in_place_of_a_tensor_is_not_executed(tmp_path: Path) -> None:
    folder, marker = written(tmp_path / "store", {"weight": torch.ones(2)}), tmp_path / "marker"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    torch.save(Payload(marker), data_file(folder))
    for where in metadata.storage_data.values():
        where.offset, where.length = 0, data_file(folder).stat().st_size
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="store cannot be read"):
        read_tensors(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps([1, 2])])
def test_a_file_that_is_no_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path / "store")
    (folder / METADATA_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read as a checkpoint's metadata"):
        read_tensors(folder)


def test_any_changed_byte_of_the_metadata_is_survived_or_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "store") / METADATA_FILE
    whole, refused = file.read_bytes(), 0
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            tensor_shapes(file.parent)
        except ValueError:
            refused += 1
    assert refused > len(whole) // 5 / 2


@pytest.mark.parametrize("what", ["cut", "deleted", "no folder"])
def test_missing_data_is_an_error_of_one_line(tmp_path: Path, what: str) -> None:
    folder = written(tmp_path / "store")
    if what == "cut":
        data_file(folder).write_bytes(data_file(folder).read_bytes()[:200])
    elif what == "deleted":
        data_file(folder).unlink()
    else:
        folder = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=f"{folder.name}.* cannot be read"):
        read_tensors(folder)
