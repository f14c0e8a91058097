"""Data sets by name or folder, through `datasets`, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_io.hub import HubData
from data_io.readers import to_record
from data_io.records import Conversation, Turn

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Why {k}?"},
            {"role": "assistant", "content": "Because."},
        ]
    }
    for k in range(3)
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads the variable once, on import; tests of one process may have it loaded."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def saved(folder: Path, kind: str) -> Path:
    """The chats as one kind of local data set, with a test split of one row where it has splits."""
    from datasets import Dataset, DatasetDict, NamedSplit

    folder.mkdir()
    data, held_out = (
        Dataset.from_list(CHATS, split=NamedSplit("train")),
        Dataset.from_list(CHATS[:1]),
    )
    if kind == "jsonl":
        for name, rows in (("train", CHATS), ("test", CHATS[:1])):
            lines = "\n".join(map(json.dumps, rows))
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    elif kind == "parquet":
        data.to_parquet(folder / "train.parquet")
        held_out.to_parquet(folder / "test.parquet")
    elif kind == "saved_splits":
        DatasetDict({"train": data, "test": held_out}).save_to_disk(folder)
    else:
        data.save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved_splits", "saved_one"])
def test_a_local_data_set_gives_its_rows(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / kind, kind)
    rows = list(HubData(str(folder)).rows())
    assert [row.fields for row in rows] == CHATS
    assert rows[1].where == f"{folder}, train, row 2"
    turns = (Turn("user", "Why 0?", is_scored=False), Turn("assistant", "Because."))
    assert to_record(rows[0].fields) == Conversation("direct", "", turns)
    if kind != "saved_one":
        assert len(list(HubData(str(folder), split="test").rows())) == 1


def test_files_of_a_data_set_can_be_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "jsonl", "jsonl")
    assert len(list(HubData(str(folder), data_files=("test.jsonl",)).rows())) == 1


@pytest.mark.parametrize(
    ("kind", "asked", "told"),
    [
        ("jsonl", {"split": "validation"}, "Available splits: .*train.*; correct the folder, or"),
        ("jsonl", {"name": "main"}, "'main' not found"),
        ("saved_splits", {"split": "validation"}, "its splits are train, test"),
        ("saved_one", {"split": "validation"}, "its only split is train"),
        ("saved_splits", {"name": "main"}, "neither configurations nor data_files"),
    ],
)
def test_what_a_folder_lacks_is_told(
    tmp_path: Path, kind: str, asked: dict[str, Any], told: str
) -> None:
    folder = saved(tmp_path / kind, kind)
    with pytest.raises(ValueError, match=told):
        list(HubData(str(folder), **asked).rows())


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(ValueError, match="cannot be read from the beginning") as told:
        list(HubData(str(tmp_path)).rows())
    assert "\n" not in str(told.value)


def test_a_name_without_a_network_leads_to_a_local_folder() -> None:
    with pytest.raises(
        ValueError,
        match=r"nobody/nothing, main, train cannot be read .*; where "
        r"there is no network, copy its files here and give their folder",
    ):
        list(HubData("nobody/nothing", "main").rows())
