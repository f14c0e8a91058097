"""Mixture files: what is legal in them, and where their sources are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from mixture_cases import choice_row, gsm8k_row, talk, write_mirror, write_rows

from data_io.hub import HubData
from data_io.mixture import ChatMixture, MissingSourceError, MixtureSource
from data_io.records import Conversation, Row
from data_io.source_files import RawRow

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "config" / "data" / "mixtures" / "sft.yaml"


def load(tmp_path: Path, text: str) -> ChatMixture:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    return ChatMixture.load(path)


def test_the_shipped_mixture_is_the_known_one() -> None:
    mixture = ChatMixture.load(SHIPPED)
    amounts = {source.name: (source.repeat, source.limit) for source in mixture.train}
    assert amounts == {
        "smoltalk": (1, None),
        "mmlu": (1, None),
        "gsm8k": (2, None),
        "identity": (2, None),
        "simple_spelling": (1, 200_000),
        "spelling_bee": (1, 80_000),
    }
    limits = {source.name: source.limit for source in mixture.validation}
    assert limits == {"smoltalk": None, "mmlu": 5_200, "gsm8k": 420}


def test_all_sources_of_the_shipped_mixture_are_found_in_a_mirror(tmp_path: Path) -> None:
    mirror = write_mirror(tmp_path)
    mixture = ChatMixture.load(SHIPPED)
    counts = {
        f"{part}/{source.name}": sum(1 for _ in source.rows(mirror))
        for part, sources in (("train", mixture.train), ("validation", mixture.validation))
        for source in sources
    }
    assert counts == {
        "train/smoltalk": 40,
        "train/mmlu": 30,
        "train/gsm8k": 12,
        "train/identity": 3,
        "train/simple_spelling": 3000,
        "train/spelling_bee": 3000,
        "validation/smoltalk": 10,
        "validation/mmlu": 20,
        "validation/gsm8k": 8,
    }


def test_rows_become_records_by_the_reader_named(tmp_path: Path) -> None:
    mirror = write_mirror(tmp_path)
    for source in ChatMixture.load(SHIPPED).train[:4]:
        record = source.to_record(next(source.rows(mirror)).fields)
        assert isinstance(record, Row if source.name == "mmlu" else Conversation)


@pytest.mark.parametrize("name", ["all.jsonl", "all.json"])
def test_conversations_that_are_bare_lists_are_read(tmp_path: Path, name: str) -> None:
    talks = [talk(3), talk(4)]
    file = tmp_path / name
    if name.endswith("l"):
        write_rows(file, [*talks, {"messages": talk(5)}])
    else:
        file.write_text(json.dumps([*talks, {"messages": talk(5)}]))
    source = MixtureSource(name="own", source=str(file), reader="message_lists")
    rows = list(source.rows(None))
    assert [row.fields["messages"] for row in rows] == [talk(3), talk(4), talk(5)]
    assert str(file) in rows[1].where


def test_a_file_of_a_folder_belongs_to_the_split_of_its_name(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test-00000-of-00001", "testimony", "validation"):
        write_rows(tmp_path / "set" / "main" / f"{name}.jsonl", [{"name": name}])

    def names(split: str) -> list[str]:
        source = MixtureSource(name="s", source=str(tmp_path / "set"), config="main", split=split)
        return [row.fields["name"] for row in source.rows(None)]

    assert names("train") == ["testimony", "train-00000-of-00001"]
    assert names("test") == ["test-00000-of-00001"]
    assert names("validation") == ["validation"]
    with pytest.raises(MissingSourceError, match="no dev part"):
        names("dev")


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([gsm8k_row(1), gsm8k_row(2)])
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "gsm8k")
    source = MixtureSource(name="g", source="gsm8k", reader="gsm8k_calls")
    assert len(list(source.rows(tmp_path))) == 2


def test_a_name_on_the_hub_is_asked_for_only_without_data_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def rows(self: HubData) -> Iterator[RawRow]:
        asked.append((self.path, self.name, self.split))
        yield RawRow("row 1", choice_row(1))

    monkeypatch.setattr(HubData, "rows", rows)
    source = MixtureSource(name="m", source="cais/mmlu", config="all", split="test")
    assert [row.where for row in source.rows(None)] == ["row 1"]
    assert asked == [("cais/mmlu", "all", "test")]
    with pytest.raises(MissingSourceError, match="there is no test part of cais/mmlu"):
        source.rows(tmp_path)
    with pytest.raises(MissingSourceError, match=r"no train part of identity\.jsonl"):
        MixtureSource(name="own", source="identity.jsonl").rows(None)
    assert len(asked) == 1


def test_the_hub_out_of_reach_is_a_missing_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(self: HubData) -> Iterator[RawRow]:
        yield from ()
        raise ValueError("no network")

    monkeypatch.setattr(HubData, "rows", rows)
    source = MixtureSource(name="m", source="cais/mmlu")
    with pytest.raises(MissingSourceError, match="m: no network; or give data_dir=DIR"):
        source.rows(None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: [", "is no YAML"),
        ("train: []", "train names no source"),
        ("- name: a", "is no mixture: the file"),
        ("train: [{name: a, source: b, repeats: 2}]", "train.0.repeats"),
        ("train: [{name: a, source: b, repeat: 0}]", "train.0.repeat"),
        ("train: [{name: a, source: b, reader: c}]", "reader=c is none of auto, rows"),
        ("train: [{name: a, source: b, reader: spelling}]", "limit says how many"),
        ("train: [{name: a, source: b}, {name: a, source: c}]", "train names a twice"),
        ("tain: []", "tain"),
    ],
)
def test_a_mixture_that_is_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        load(tmp_path, text)
    assert str(tmp_path / "mixture.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('[]\n[{"role":\n')
    source = MixtureSource(name="own", source=str(tmp_path / "own.jsonl"), reader="message_lists")
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2 is no JSON"):
        list(source.rows(None))
