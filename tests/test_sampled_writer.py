"""Writing a sampled folder: published whole or not at all, and only what can be read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter, token_dtype

INFO = TokenizerInfo(vocab_size=50)


def one_example(length: int = 4, start: int = 0) -> EpochIndex:
    columns = ([start], [1], [start + 1], [length - 1])
    return EpochIndex(*(np.array(column) for column in columns))


def write(folder: Path, ids: list[int], **settings: Any) -> None:
    with SampledWriter(folder, INFO, max_seq_len=9, **settings) as writer:
        writer.add_tokens(np.array(ids))
        writer.add_epoch(one_example(len(ids)))


def test_parts_are_appended_in_order(tmp_path: Path) -> None:
    with SampledWriter(tmp_path / "data", INFO, max_seq_len=9, scored=True) as writer:
        parts = [np.arange(k, k + 5) for k in (0, 10, 20)]
        offsets = [writer.add_tokens(part, (part % 2).astype(np.uint8)) for part in parts]
        writer.add_epoch(one_example(5, offsets[2]))
        writer.add_epoch(one_example(4, offsets[1]))
    data = SampledData.open(tmp_path / "data")
    tokens, scored = data.tokens(), data.scored()
    assert offsets == [0, 5, 10]
    assert scored is not None
    assert tokens.tolist() == np.concatenate(parts).tolist()
    assert scored.tolist() == (tokens % 2).tolist()
    assert data.num_epochs == 2
    assert data.epoch(0).inst_start.tolist() == [10]


def test_metadata_is_what_the_published_loader_reads(tmp_path: Path) -> None:
    info = TokenizerInfo(vocab_size=50, tokenizer_path="tök", condition_mapping={"direct": "<d>"})
    with SampledWriter(tmp_path / "data", info, max_seq_len=9) as writer:
        writer.add_tokens(np.arange(10))
        for length in (3, 4, 4):
            writer.add_epoch(one_example(length))
    assert json.loads((tmp_path / "data" / "metadata.json").read_text(encoding="utf-8")) == {
        "tokenizer_info": {
            "tokenizer_path": "tök",
            "condition_mapping": {"direct": "<d>"},
            "vocab_size": 50,
        },
        "vocab_size": None,
        "max_seq_len": 9,
        "total_length": 4,  # the mean of 3, 4 and 4, rounded
    }
    index = np.load(tmp_path / "data" / "epoch_0" / "inst_len.npy")
    assert index.dtype == np.int64


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65_536, "uint16"), (65_537, "int32")]
)
def test_ids_take_two_bytes_up_to_a_vocabulary_of_65536(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_a_type_can_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "data", [1, 2, 3], dtype=np.dtype(np.int32))
    assert SampledData.open(tmp_path / "data").tokens().dtype == np.int32


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError),
        SampledWriter(tmp_path / "data", INFO, max_seq_len=9) as writer,
    ):
        writer.add_tokens(np.arange(5))
        raise KeyError("a fault of the caller")
    with (
        pytest.raises(ValueError, match="no epoch was added; add at least one"),
        SampledWriter(tmp_path / "data", INFO, max_seq_len=9),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_that_the_caller_puts_into_staging_are_published_too(tmp_path: Path) -> None:
    with SampledWriter(tmp_path / "data", INFO, max_seq_len=9) as writer:
        (writer.staging / "tokenizer.json").write_text("{}")
        assert not (tmp_path / "data").exists()
        writer.add_tokens(np.arange(4))
        writer.add_epoch(one_example())
    assert (tmp_path / "data" / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_only_sampled_data_is_ever_overwritten_and_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, [1, 2, 3])  # an empty folder is free
    with pytest.raises(ValueError, match="exists and is not empty; choose another folder"):
        write(folder, [4, 5, 6])
    write(folder, [4, 5, 6], overwrite=True)
    assert SampledData.open(folder).tokens().tolist() == [4, 5, 6]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    (tmp_path / "papers" / "tokens.npy").touch()  # as tokenized data have, too
    for place in (tmp_path / "papers", tmp_path / "papers" / "thesis.tex"):
        with pytest.raises(ValueError, match="only such a folder is ever replaced"):
            write(place, [1, 2, 3], overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "papers"]


def test_of_two_runs_at_once_the_slower_replaces_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with (
        pytest.raises(ValueError, match="exists and is not empty"),
        SampledWriter(folder, INFO, max_seq_len=9) as writer,
    ):
        writer.add_tokens(np.array([1, 2, 3]))
        writer.add_epoch(one_example(3))
        folder.mkdir()
        (folder / "thesis.tex").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "thesis.tex"]


def test_what_could_not_be_read_again_is_refused_at_once(tmp_path: Path) -> None:
    def writer(**settings: Any) -> SampledWriter:
        return SampledWriter(tmp_path / "data", INFO, max_seq_len=9, **settings)

    with pytest.raises(ValueError, match=r"ids from 3 to 50 are not all in 0\.\.49"), writer() as w:
        w.add_tokens(np.array([3, 50]))
    with pytest.raises(ValueError, match="ids from -1 to 3"), writer() as w:
        w.add_tokens(np.array([-1, 3]))
    with pytest.raises(ValueError, match="give `scored`, one value per id"), writer() as w:
        w.add_tokens(np.arange(3), np.ones(3, np.uint8))
    with pytest.raises(ValueError, match="give `scored`"), writer(scored=True) as w:
        w.add_tokens(np.arange(3), np.ones(2, np.uint8))
    with pytest.raises(ValueError, match="it must end within the 3 tokens"), writer() as w:
        w.add_tokens(np.arange(3))
        w.add_epoch(one_example(4))
    with pytest.raises(ValueError, match="must not exceed max_seq_len=9"), writer() as w:
        w.add_tokens(np.arange(20))
        w.add_epoch(one_example(10))
