"""A file of rows appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_io.jsonl_writer import JsonlWriter
from data_io.records import Row


def test_rows_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(Row("cot", "line\nbreak \u2028 é", "x"))
        writer.write({"text": "y"})
        assert not path.exists()
    assert writer.num_rows == 2
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {
        "condition": "cot",
        "instruction": "line\nbreak \u2028 é",
        "response": "x",
    }
    assert lines[1:] == [b'{"text": "y"}', b""]
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("mine\n")
    with pytest.raises(KeyboardInterrupt), JsonlWriter(path, overwrite=True) as writer:
        writer.write({"text": "y"})
        raise KeyboardInterrupt
    assert path.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("mine\n")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left"),
        JsonlWriter(path, overwrite=True) as writer,
    ):
        writer.write({"text": "y"})
    assert path.read_text() == "mine\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name a file"):
        JsonlWriter(tmp_path, overwrite=True)
