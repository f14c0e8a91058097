"""Reading a sampled folder: the published ones as they are, and each broken one with its rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import data_io.sampled_format as sampled_format
from data_io.sampled_format import SampledData, SampledMetadata, TokenizerInfo
from data_io.sampled_writer import SampledWriter

INDEX = {"inst_start": [0, 5], "inst_len": [3, 1], "resp_start": [3, 6], "resp_len": [2, 4]}
METADATA = {
    "tokenizer_info": {"vocab_size": 300},
    "vocab_size": None,
    "max_seq_len": 6,
    "total_length": 10,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A legal sampled folder of two epochs, written by hand."""
    place = tmp_path / "data"
    for epoch in range(2):
        (place / f"epoch_{epoch}").mkdir(parents=True)
        for name, values in INDEX.items():
            np.save(place / f"epoch_{epoch}" / f"{name}.npy", np.array(values))
    np.save(place / "tokens.npy", np.arange(10, dtype=np.int32))
    (place / "metadata.json").write_text(json.dumps(METADATA))
    return place


def change_metadata(folder: Path, **changes: Any) -> None:
    (folder / "metadata.json").write_text(json.dumps({**METADATA, **changes}))


def read_all(folder: Path) -> None:
    data = SampledData.open(folder)
    for epoch in range(data.num_epochs):
        data.epoch(epoch)


def test_golden_data_opens_and_gives_the_published_metadata(golden_dataset_batches: Path) -> None:
    case = json.loads((golden_dataset_batches / "case.json").read_text())
    data = SampledData.open(golden_dataset_batches / case["dataset"])
    assert data.metadata.train_metadata() == case["loaded_metadata"]
    assert data.num_epochs >= case["epochs"]


def test_golden_runs_hold_the_metadata_that_their_data_gives(golden_folder: Path) -> None:
    for path in golden_folder.rglob("train_metadata.yaml"):
        stored = yaml.safe_load(path.read_text())
        assert SampledData.open(path.parent / "data").metadata.train_metadata() == stored
        TokenizerInfo.model_validate(stored["tokenizer_info"])


def test_golden_folders_of_every_kind_are_legal(golden_folder: Path) -> None:
    folders = {path.parent.parent for path in golden_folder.rglob("epoch_0/inst_len.npy")}
    for folder in sorted(folders):
        read_all(folder)


def test_what_the_model_sees_follows_from_the_file(folder: Path) -> None:
    metadata = SampledData.open(folder).metadata
    assert (metadata.model_max_seq_len, metadata.padded_vocab_size) == (5, 512)
    exact = SampledMetadata.model_validate({**METADATA, "tokenizer_info": {"vocab_size": 512}})
    assert exact.padded_vocab_size == 512


def test_train_metadata_keeps_what_is_known_of_the_tokenizer(folder: Path) -> None:
    info = {"boq": "<q>", "condition_mapping": {"direct": "<d>"}}
    change_metadata(folder, tokenizer_info={**info, "vocab_size": 300})
    assert SampledData.open(folder).metadata.train_metadata()["tokenizer_info"] == info


def test_row_lengths_leave_out_the_last_token(folder: Path) -> None:
    index = SampledData.open(folder).epoch(1)
    assert index.row_lengths().tolist() == [4, 4]
    assert index.row_lengths().dtype == np.int32


def test_every_integer_type_is_read(folder: Path) -> None:
    for name, dtype in zip(INDEX, (np.uint8, np.uint64, np.int16, np.uint32), strict=True):
        np.save(folder / "epoch_0" / f"{name}.npy", np.array(INDEX[name], dtype))
    np.save(folder / "tokens.npy", np.arange(10, dtype=np.uint8))
    assert SampledData.open(folder).epoch(0).row_lengths().tolist() == [4, 4]


def replace_index(name: str, values: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "epoch_1" / f"{name}.npy", np.array(values))


def truncate(name: str, size: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])

    return cut


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no metadata": (lambda f: (f / "metadata.json").unlink(), r"metadata\.json is missing"),
    "no tokens": (lambda f: (f / "tokens.npy").unlink(), r"tokens\.npy is missing .* copy it"),
    "no index": (lambda f: (f / "epoch_1/resp_len.npy").unlink(), r"epoch_1/resp_len\.npy is miss"),
    "no epochs": (lambda f: [shutil.rmtree(p) for p in f.glob("epoch_*")], "holds 0 prepared"),
    "no JSON": (lambda f: (f / "metadata.json").write_text("{"), r"metadata\.json is not .*JSON"),
    "unknown key": (lambda f: change_metadata(f, vocab=1), r"metadata.* vocab=1: Extra inputs"),
    "vocab_size set": (lambda f: change_metadata(f, vocab_size=300), "vocab_size=300: .* null"),
    "short context": (lambda f: change_metadata(f, max_seq_len=1), "max_seq_len=1: .* 2"),
    "no id limit": (lambda f: change_metadata(f, tokenizer_info={}), "vocab_size is missing; wri"),
    "negative start": (replace_index("inst_start", [0, -1]), "example 1 has inst_start=-1, .* 0"),
    "empty question": (replace_index("inst_len", [0, 1]), "example 0 has inst_len=0, .* at least"),
    "empty answer": (replace_index("resp_len", [2, 0]), "example 1 has resp_len=0, but every"),
    "past the end": (replace_index("resp_start", [3, 7]), "example 1 has resp_start=7, .* 10 tok"),
    "huge start": (replace_index("inst_start", [2**63 - 1, 0]), "example 0 has inst_start=9223"),
    "huge unsigned": (
        replace_index("inst_start", np.array([2**64 - 1, 0], np.uint64)),
        "inst_start=18446",
    ),
    "too long": (replace_index("resp_len", [2, 7]), "example 1 has resp_len=7, .* max_seq_len=6"),
    "sum too long": (replace_index("inst_len", [5, 1]), r"inst_len \+ resp_len must not exceed"),
    "unequal": (replace_index("inst_len", [3, 1, 1]), r"one value per example.*\(3,\)"),
    "two-dimensional": (replace_index("inst_len", [[3, 1]]), r"one row of integers, .*\(1, 2\)"),
    "floats": (replace_index("inst_len", [3.0, 1.0]), "one row of integers, but is float64"),
    "cut index": (truncate("epoch_0/resp_len.npy", 140), r"resp_len\.npy is no whole \.npy file"),
    "cut header": (truncate("tokens.npy", 60), r"tokens\.npy is no whole .* copy it again"),
    "nothing left": (truncate("tokens.npy", 0), r"tokens\.npy is no whole"),
    "id too large": (
        lambda f: np.save(f / "tokens.npy", np.arange(291, 301)),
        r"tokens\.npy: id 300 .* 0\.\.299 .* use the tokenizer that made",
    ),
    "id negative": (lambda f: np.save(f / "tokens.npy", np.arange(-1, 9)), "id -1"),
    "scored unsaid": (
        lambda f: np.save(f / "scored.npy", np.ones(10, np.uint8)),
        r'scored\.npy exists, but .* "scored": true',
    ),
    "scored missing": (lambda f: change_metadata(f, scored=True), r"scored\.npy is missing"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_named_with_the_rule(folder: Path, fault: str) -> None:
    breaks, message = BROKEN[fault]
    breaks(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_all(folder)
    assert str(folder) in str(caught.value)


def test_scored_needs_one_byte_per_token(folder: Path) -> None:
    change_metadata(folder, scored=True)
    np.save(folder / "scored.npy", np.ones(9, np.uint8))
    with pytest.raises(ValueError, match=r"uint8 of shape \(9,\); it must be .* \(10,\)"):
        SampledData.open(folder)
    np.save(folder / "scored.npy", np.array([0, 1] * 5, np.uint8))
    scored = SampledData.open(folder).scored()
    assert scored is not None and scored.sum() == 5


def test_a_folder_that_is_not_there_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of sampled data; make one"):
        SampledData.open(tmp_path / "nowhere")


def test_more_epochs_than_prepared_are_refused(folder: Path) -> None:
    data = SampledData.open(folder)
    data.require_epochs(2)
    with pytest.raises(FileNotFoundError, match="2 prepared epochs, but epochs=3 are asked for"):
        data.require_epochs(3)


def test_ids_of_large_data_are_checked_as_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(folder / "tokens.npy", np.full(10, 300))
    monkeypatch.setattr(sampled_format, "EAGER_TOKENS", 9)
    data = SampledData.open(folder)
    with pytest.raises(ValueError, match="id 300 in example 7"):
        data.check_ids(data.tokens()[2:4], "in example 7")


def test_the_fingerprint_follows_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    first = SampledData.open(folder).fingerprint(2)
    shutil.copytree(folder, tmp_path / "copy")
    copy = SampledData.open(tmp_path / "copy")
    assert copy.fingerprint(2) == first != copy.fingerprint(1)
    replace_index("resp_start", [4, 6])(tmp_path / "copy")
    assert copy.fingerprint(2) != first
    assert copy.fingerprint(1) == SampledData.open(folder).fingerprint(1)
    np.save(tmp_path / "copy" / "tokens.npy", np.arange(1, 11, dtype=np.int32))
    assert copy.fingerprint(1) != SampledData.open(folder).fingerprint(1)


def test_writing_and_reading_are_inverse(folder: Path, tmp_path: Path) -> None:
    source = SampledData.open(folder)
    with SampledWriter(tmp_path / "out", source.metadata.tokenizer_info, max_seq_len=6) as writer:
        writer.add_tokens(source.tokens())
        for epoch in range(2):
            writer.add_epoch(source.epoch(epoch))
    written = SampledData.open(tmp_path / "out")
    assert written.metadata == source.metadata
    assert written.tokens().tolist() == source.tokens().tolist()
    assert written.epoch(1).resp_start.tolist() == INDEX["resp_start"]
