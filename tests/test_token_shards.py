"""Token shards of the nanoGPT family: what is written, and what is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.token_shards import (
    HEADER_BYTES,
    Part,
    ShardConfig,
    ShardFolder,
    ShardFolderWriter,
    examples_as_documents,
)

CONFIG = ShardConfig(vocab_size=300, bos_id=7)
Document = tuple[NDArray[np.int64], NDArray[np.int64]]


def documents(count: int, seed: int = 0) -> list[Document]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = np.r_[7, draw.integers(8, 300, draw.integers(1, 30))]
        found.append((ids, (draw.random(len(ids)) < 0.5).astype(np.int64)))
    return found


def write_shards(
    folder: Path, parts: dict[Part, list[Document]], *, is_masked: bool, shard_tokens: int = 100
) -> Path:
    with ShardFolderWriter(
        folder, CONFIG, is_masked=is_masked, shard_tokens=shard_tokens
    ) as writer:
        for part, found in parts.items():
            for ids, mask in found:
                writer.add(part, ids, mask if is_masked else None)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts: dict[Part, list[Document]] = {"val": documents(12), "train": documents(40, 1)}
    return write_shards(tmp_path / "shards", parts, is_masked=True)


def test_a_shard_is_header_and_tokens_as_others_read_them(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*[0-9].bin"))
    assert names[0] == "tokens_train_000003.bin" and names[-1] == "tokens_val_000002.bin"
    assert [int(name[-10:-4]) for name in names] == [*range(3, len(names)), 0, 1, 2]
    config = json.loads((folder / "config.json").read_text())
    assert config == {"vocab_size": 300, "bos_id": 7}
    for part, count, seed in (("val", 12, 0), ("train", 40, 1)):
        tokens: list[int] = []
        masks: list[int] = []
        for path in sorted(folder.glob(f"*_{part}_*[0-9].bin")):
            for file, into in ((path, tokens), (path.with_name(f"{path.stem}_mask.bin"), masks)):
                raw = file.read_bytes()
                header = np.frombuffer(raw[:1024], "<i4")
                values = np.frombuffer(raw[1024:], "<u2")
                assert header[:3].tolist() == [20240520, 1, len(values)] and not header[3:].any()
                into += values.tolist()
            assert len(tokens) == len(masks) and np.frombuffer(raw[1024:], "<u2").max() <= 1
        expected = documents(count, seed)
        assert tokens == np.concatenate([ids for ids, _ in expected]).tolist()
        assert masks == np.concatenate([mask for _, mask in expected]).tolist()


def test_every_shard_begins_with_a_document(folder: Path) -> None:
    shards = ShardFolder.open(folder)
    assert shards.is_masked and shards.config == CONFIG
    for shard in (*shards.parts["val"], *shards.parts["train"]):
        assert shard.tokens()[0] == CONFIG.bos_id and len(shard.tokens()) <= 100


def test_a_mask_without_a_header_is_read(folder: Path) -> None:
    shard = ShardFolder.open(folder).parts["train"][0]
    mask = shard.mask().tolist()
    shard.mask_path.write_bytes(shard.mask_path.read_bytes()[HEADER_BYTES:])
    assert shard.mask().tolist() == mask


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path: Path) -> None:
    config = ShardConfig(vocab_size=65_537, bos_id=0)
    with pytest.raises(ValueError, match="vocab_size=65537 is more than the 65536 ids"):
        ShardFolderWriter(tmp_path / "shards", config, is_masked=False)
    assert not any(tmp_path.iterdir())
    largest = ShardConfig(vocab_size=65_536, bos_id=65_535)
    with ShardFolderWriter(tmp_path / "shards", largest, is_masked=False) as writer:
        writer.add("train", np.array([65_535, 0]), None)
    (shard,) = ShardFolder.open(tmp_path / "shards").parts["train"]
    assert shard.tokens().tolist() == [65_535, 0]


@pytest.mark.parametrize(
    ("ids", "told"),
    [([8, 9], "must begin a document"), ([7, 9, 7], "nowhere else"), ([7, 300], "0..299")],
)
def test_a_document_that_others_would_misread_is_refused(
    tmp_path: Path, ids: list[int], told: str
) -> None:
    with (
        pytest.raises(ValueError, match=told),
        ShardFolderWriter(tmp_path / "shards", CONFIG, is_masked=False) as writer,
    ):
        writer.add("train", np.array(ids), None)
    assert not any(tmp_path.iterdir())


def test_other_files_are_never_replaced(folder: Path) -> None:
    with pytest.raises(ValueError, match="exists and is not empty"):
        ShardFolderWriter(folder, CONFIG, is_masked=False)


def spoil(path: Path, at: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + 4] = np.array([value], "<i4").tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (0, 20240519, r"begins with \[20240519, 1\], but a token shard begins with 20240520, 1"),
        (4, 2, r"begins with \[20240520, 2\]"),
        (8, 1, "its header says 1 tokens, which take 1026"),
        (8, -1, "its header says -1 tokens"),
    ],
)
def test_a_header_that_lies_is_named(folder: Path, at: int, value: int, told: str) -> None:
    shard = ShardFolder.open(folder).parts["train"][0]
    spoil(shard.path, at, value)
    with pytest.raises(ValueError, match=told) as error:
        shard.tokens()
    assert str(shard.path) in str(error.value)


def test_a_file_cut_short_is_named(folder: Path) -> None:
    shard = ShardFolder.open(folder).parts["train"][0]
    for size in (10, HEADER_BYTES + 7):
        shard.path.write_bytes(shard.path.read_bytes()[:size])
        with pytest.raises(ValueError, match=str(shard.path)):
            shard.tokens()


def test_a_mask_that_does_not_fit_is_named(folder: Path) -> None:
    first, *_, second = ShardFolder.open(folder).parts["train"]
    assert len(first.tokens()) != len(second.tokens())
    content = first.mask_path.read_bytes()
    spoil(first.mask_path, HEADER_BYTES, 2)
    with pytest.raises(ValueError, match="holds 2, but a mask holds 0 and 1"):
        first.mask()
    second.mask_path.write_bytes(content)
    with pytest.raises(ValueError, match="they belong to different data"):
        second.mask()


def take_a_mask(folder: Path) -> None:
    (folder / "tokens_train_000004_mask.bin").unlink()


def share_a_number(folder: Path) -> None:
    (folder / "tokens_val_000003.bin").write_bytes(b"")


def rename_one(folder: Path) -> None:
    (folder / "tokens_train_000004.bin").rename(folder / "part4.bin")


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": "300", "bos_id": 7}')


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (take_a_mask, "tokens_train_000004_mask.bin is missing"),
        (share_a_number, "have one number"),
        (rename_one, "a shard is called"),
        (drop_config, "write vocab_size and bos_id"),
        (spoil_config, "config.json: vocab_size"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, fault: object, told: str) -> None:
    assert callable(fault)
    fault(folder)
    with pytest.raises(ValueError, match=told):
        ShardFolder.open(folder)


def test_examples_become_documents_with_their_masks(tmp_path: Path) -> None:
    info = TokenizerInfo(vocab_size=300)
    with SampledWriter(tmp_path / "data", info, max_seq_len=9, scored=True) as writer:
        writer.add_tokens(np.array([7, 11, 12, 20, 21]), np.array([1, 1, 0, 1, 1], np.uint8))
        columns = ([3, 0], [1, 1], [4, 1], [1, 2])
        writer.add_epoch(EpochIndex(*(np.array(column) for column in columns)))
    data = SampledData.open(tmp_path / "data")
    found = [(ids.tolist(), mask.tolist()) for ids, mask in examples_as_documents(data, 7)]
    assert found == [([7, 20, 21], [0, 0, 1]), ([7, 11, 12], [0, 1, 0])]
