"""Tokenized folders as they are read: every broken rule is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenized_cases import Sources, numbered_rows

from data_io.tokenized_format import (
    MadeBy,
    TokenizedSource,
    read_tokenizer_info,
    tokenized_folders,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Sources(tmp_path / "tokenized").add("a.jsonl", numbered_rows(5))


def test_a_source_is_mapped_not_loaded(folder: Path) -> None:
    source = TokenizedSource.open(folder)
    source.check()
    assert (source.name, len(source)) == ("a.jsonl", 5)
    assert isinstance(source.tokens.base, np.memmap) or isinstance(source.tokens, np.memmap)


def test_folders_are_listed_by_name_without_hidden_ones(folder: Path) -> None:
    root = folder.parent
    folder.rename(root / "b.jsonl")
    (root / ".c.jsonl.partial").mkdir()
    (root / ".c.jsonl.partial" / "metadata.json").write_text("{}")
    (root / "notes").mkdir()
    assert [path.name for path in tokenized_folders(root)] == ["b.jsonl"]
    with pytest.raises(FileNotFoundError, match="no folder of tokenized data"):
        tokenized_folders(root / "absent")


def test_an_empty_source_is_legal(folder: Path) -> None:
    empty = Sources(folder.parent.parent / "other").add("e.jsonl", [])
    source = TokenizedSource.open(empty)
    source.check()
    assert len(source) == len(source.tokens) == 0


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("inst_len", [1, 2], "one value per row"),
        ("inst_len", [2, 3, 4, 2, 0], "row 4 has inst_start=.* inst_len=0"),
        ("inst_len", [2, 3, 4, 2, 2**40], "row 4 .* within the"),
        ("inst_len", [2**40, 3, 4, 2, 3], "row 0 has inst_start=0 and inst_len=1099511627776"),
        ("resp_start", [2, 7, 13, 10, 2**63], "row 4 has resp_start=9223372036854775808"),
        ("tokens", [[1, 2]], "one row of integers"),
        ("scored", [1, 0], "it must be 26 of uint8"),
    ],
)
def test_broken_arrays_are_named(folder: Path, name: str, values: list[int], fault: str) -> None:
    np.save(folder / f"{name}.npy", np.array(values, np.uint64))
    with pytest.raises(ValueError, match=fault) as refusal:
        TokenizedSource.open(folder).check()
    assert str(folder) in str(refusal.value)


def test_absent_and_torn_files_are_named(folder: Path) -> None:
    tokens = folder / "tokens.npy"
    tokens.write_bytes(tokens.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"tokens\.npy is no whole \.npy file"):
        TokenizedSource.open(folder)
    tokens.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens\.npy is missing"):
        TokenizedSource.open(folder)
    (folder / "metadata.json").write_text('{"source_mtime": 1}')
    with pytest.raises(ValueError, match=r"metadata\.json: source_size"):
        TokenizedSource.open(folder)


def test_tokenizer_info_needs_a_vocabulary(folder: Path) -> None:
    root = folder.parent
    info = read_tokenizer_info(root)
    assert info.vocab_size == 287
    file = root / "tokenizer_info.json"
    file.write_text(json.dumps(info.model_dump(exclude={"vocab_size"})))
    with pytest.raises(ValueError, match="lacks vocab_size"):
        read_tokenizer_info(root)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_info\.json is missing"):
        read_tokenizer_info(root)


def test_what_made_a_folder_may_be_unknown(folder: Path) -> None:
    assert MadeBy.find(folder) is None
    (folder / "made.json").write_text('{"fingerprint": 1}')
    assert MadeBy.find(folder) is None
