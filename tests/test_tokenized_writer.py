"""Tokenized folders as they are written: byte for byte as published, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_io.tokenized_format import MadeBy, TokenizedSource, tokenized_folders
from data_io.tokenized_writer import TokenizedWriter, locked, remove_folder

METADATA = {"source_mtime": 1, "source_size": 2}
MADE = MadeBy(
    fingerprint="f",
    source_size=2,
    source_mtime_ns=1,
    source_rows=2,
    examples=2,
    tokens=9,
    dropped={},
)
UINT16 = np.dtype(np.uint16)


def lens(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def write(folder: Path, *scored: list[int] | None) -> TokenizedSource:
    """Two batches of one row each: 2 + 3 and 1 + 3 tokens."""
    parts = [(lens(2), lens(3)), (lens(1), lens(3))]
    at = 0
    with TokenizedWriter(folder, token_type=UINT16) as writer:
        for (inst, resp), marks in zip(parts, scored, strict=True):
            count = int(inst.sum() + resp.sum())
            values = None if marks is None else np.array(marks, np.uint8)
            writer.add(np.arange(at, at + count), inst, resp, values)
            at += count
        writer.publish(METADATA, MADE)
    return TokenizedSource.open(folder)


def test_golden_sources_are_written_byte_for_byte(golden_data_io: Path, tmp_path: Path) -> None:
    case = json.loads((golden_data_io / "case.json").read_text())
    folders = tokenized_folders(golden_data_io / case["input"])
    assert folders
    for folder in folders:
        source = TokenizedSource.open(folder)
        source.check()
        half = len(source) // 2
        with TokenizedWriter(tmp_path / folder.name, token_type=source.tokens.dtype) as writer:
            for rows in (slice(None, half), slice(half, None)):
                inst, resp = source.inst_len[rows], source.resp_len[rows]
                starts, ends = source.inst_start[rows], source.resp_start[rows] + resp
                ids = [source.tokens[a:b] for a, b in zip(starts, ends, strict=True)]
                writer.add(np.concatenate(ids), inst, resp, None)
            writer.publish(source.metadata.model_dump(), MADE)
        for file in folder.iterdir():
            again = (tmp_path / folder.name / file.name).read_bytes()
            is_json = file.suffix == ".json"
            assert (
                json.loads(again) == json.loads(file.read_bytes())
                if is_json
                else (again == file.read_bytes())
            ), file


def test_rows_follow_one_another(tmp_path: Path) -> None:
    source = write(tmp_path / "a", None, None)
    source.check()
    assert source.tokens.tolist() == list(range(9)) and source.tokens.dtype == np.uint16
    assert source.inst_start.tolist() == [0, 5] and source.inst_len.tolist() == [2, 1]
    assert source.resp_start.tolist() == [2, 6] and source.resp_len.tolist() == [3, 3]
    assert source.scored is None and source.inst_start.dtype == np.uint64
    assert MadeBy.find(source.folder) == MADE


def test_scored_begins_with_the_first_rows_that_have_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a", None, [1, 0, 1, 1])
    assert source.scored is not None
    assert source.scored.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1]
    source = write(tmp_path / "a", [1, 1, 0, 0, 1], None)
    assert source.scored is not None
    assert source.scored.tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", None, None)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with (
        pytest.raises(RuntimeError, match="stop"),
        TokenizedWriter(tmp_path / "a", token_type=UINT16) as writer,
    ):
        writer.add(np.arange(3), lens(1), lens(2), None)
        raise RuntimeError("stop")
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_run_at_a_time_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".b.jsonl.partial").mkdir()
    (tmp_path / ".b.jsonl.position").write_text("17")
    (tmp_path / ".mine").write_text("kept")
    write(tmp_path / "a", None, None)
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine", "a"]
        with pytest.raises(ValueError, match="another run is writing"), locked(tmp_path):
            pass
        (tmp_path / ".c.jsonl.partial").mkdir()  # of a worker that was stopped
    remove_folder(tmp_path / "a")
    assert not tokenized_folders(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine"]


def test_a_worker_that_outlives_its_run_publishes_nothing(tmp_path: Path) -> None:
    with TokenizedWriter(tmp_path / "a", token_type=UINT16) as orphan:
        orphan.add(np.arange(3), lens(1), lens(2), None)
        with locked(tmp_path), TokenizedWriter(tmp_path / "a", token_type=UINT16) as writer:
            assert not orphan.staging.exists() and writer.staging.exists()
            with pytest.raises(FileNotFoundError):
                orphan.publish(METADATA, MADE)
            writer.add(np.arange(5), lens(2), lens(3), None)
            writer.publish(METADATA, MADE)
    assert TokenizedSource.open(tmp_path / "a").tokens.tolist() == list(range(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a"]
