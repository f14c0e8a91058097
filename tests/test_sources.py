"""Data sets among the sources of a command: read, tokenized again when they change, and told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizing_cases import ROWS, Place

from data_io.hub import HubData
from data_io.sources import DataSetSource, find_all_sources, require_apart
from data_io.tokenized_format import MadeBy
from data_io.train_tokenizer import main as train_tokenizer
from data_io.verify import main as verify

CACHED = "0123456789abcdef"  # the commit that a data set in the cache of `datasets` is of


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No network; an empty cache."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def save(folder: Path, rows: list[dict[str, Any]], *, splits: bool = False) -> Path:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(rows)
    both = DatasetDict({"train": data, "test": data.select([0])})
    (both if splits else data).save_to_disk(folder)
    return folder


def put_into_cache(cache: Path, rows: list[dict[str, Any]], commit: str = CACHED) -> None:
    """As if somebody/talks had been loaded when there was a network."""
    from datasets import load_dataset_builder

    source = cache.parent / "talks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = cache / "somebody___talks" / "main" / "0.0.0" / commit
    builder = load_dataset_builder(
        "json", data_files={"train": str(source)}, cache_dir=str(cache.parent / f"made-{commit}")
    )
    builder.download_and_prepare(output_dir=str(folder))
    (folder / "json-train.arrow").rename(folder / "talks-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "config_name": "main"}))


def tokenize(place: Place, source: str | Path, *more: str) -> None:
    from data_io.tokenize import main

    main([str(source), *place.arguments[1:], "workers=1", *more])


@pytest.mark.parametrize("spelling", ["{}", "hub:{}"])
def test_what_save_to_disk_wrote_is_read_and_followed(
    place: Place, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    place.write("same.jsonl", ROWS)
    place.run()
    expected = place.examples("same.jsonl")
    saved = save(place.root / "saved", ROWS, splits=True)
    source = spelling.format(saved)
    tokenize(place, source)
    assert place.names() == ["saved__train"] and place.examples("saved__train") == expected
    capsys.readouterr()
    tokenize(place, source)
    assert "0 tokenized, 1 unchanged" in capsys.readouterr().out
    verify([str(place.out), f"sources={source}"])
    save(saved, ROWS[:1] * 3, splits=True)
    with pytest.raises(SystemExit):
        verify([str(place.out), f"sources={source}"])
    assert "changed after it was tokenized" in capsys.readouterr().out
    tokenize(place, source)
    assert "1 sources again: source has changed" in capsys.readouterr().err
    assert place.examples("saved__train") == expected[:1] * 3
    tokenize(place, source, "split=test")
    assert place.names() == ["saved__test"] and place.examples("saved__test") == expected[:1]


def test_a_folder_that_datasets_reads_needs_the_prefix_only_for_its_split(place: Place) -> None:
    for name, rows in (("train.jsonl", ROWS), ("test.jsonl", ROWS[:1])):
        place.write(name, rows)
    tokenize(place, f"hub:{place.data}", "split=test")
    assert place.names() == ["data__test"] and len(place.examples("data__test")) == 1
    before = (place.out / "data__test").stat().st_ino
    place.write("train.jsonl", ROWS[:1])  # another split
    tokenize(place, f"hub:{place.data}", "split=test")
    assert (place.out / "data__test").stat().st_ino == before


@pytest.mark.parametrize(
    ("source", "more", "told"),
    [
        ("hub:nobody/nothing", [], "where there is no network, copy its files here"),
        ("hub:", [], "hub: is neither a name on the hub nor a folder that is here; write hub:OW"),
        ("hub:./gone", [], "neither a name on the hub nor a folder"),
        ("saved", ["split=trian"], "its splits are train, test"),
        ("hub:{data}", ["split=trian"], "its splits are train"),
        ("hub:saved", ["config=main"], "neither configurations nor data_files"),
    ],
)
def test_what_is_not_there_is_told_in_a_line_before_anything_is_touched(
    place: Place, monkeypatch: pytest.MonkeyPatch, source: str, more: list[str], told: str
) -> None:
    monkeypatch.chdir(place.root)
    place.write("train.jsonl", ROWS)
    save(place.root / "saved", ROWS, splits=True)
    place.run()
    before = sorted(place.out.rglob("*"))
    with pytest.raises(ValueError, match=told) as error:
        tokenize(place, source.format(data=place.data), *more)
    assert "\n" not in str(error.value)
    assert sorted(place.out.rglob("*")) == before


def test_a_data_set_of_the_cache_is_known_by_its_commit(
    place: Place, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_into_cache(cache, ROWS)
    arguments = ("hub:somebody/talks", "config=main")
    tokenize(place, *arguments)
    (name,) = place.names()
    assert name == "somebody__talks__main__train" and len(place.examples(name)) == 2
    made = MadeBy.find(place.out / name)
    assert made is not None and made.source_identity is not None
    assert CACHED in made.source_identity
    capsys.readouterr()
    tokenize(place, *arguments)
    assert "0 tokenized, 1 unchanged" in capsys.readouterr().out
    shutil.rmtree(cache)
    put_into_cache(cache, ROWS[:1], "fedcba9876543210")
    tokenize(place, *arguments)
    assert "1 sources again: source has changed" in capsys.readouterr().err
    assert len(place.examples(name)) == 1


def test_what_nothing_tells_the_state_of_is_tokenized_again(
    place: Place, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_into_cache(cache, ROWS)
    facts = HubData.facts

    def unknown(self: HubData) -> Any:
        found = facts(self)
        return found._replace(state=type(found.state)(found.state.size, 0, None))

    monkeypatch.setattr(HubData, "facts", unknown)
    for _ in range(2):
        tokenize(place, "hub:somebody/talks", "config=main")
    told = capsys.readouterr()
    assert "1 sources again: nothing tells whether the data set has changed" in told.err
    assert told.out.count("1 tokenized, 0 unchanged") == 2


def test_a_data_set_that_changes_while_it_is_read_is_refused(place: Place) -> None:
    saved = save(place.root / "saved", ROWS)
    (source,) = find_all_sources([saved], None, "train")
    save(saved, ROWS[:1])
    with pytest.raises(ValueError, match="saved, train changed while it was read; run again"):
        list(source.rows())


def test_reading_tells_how_far_it_is_and_refuses_endless_rows(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_io.sources.REPORTED_ROWS", 1)
    source = DataSetSource.find(HubData(str(save(place.root / "saved", ROWS))))
    told: list[int] = []
    assert len(list(source.rows(told.append))) == 2
    assert told == [source.state.size // 2, source.state.size]
    monkeypatch.setattr("data_io.sources.MAX_LINE_BYTES", 3)
    with pytest.raises(ValueError, match=r"row 1 is longer than 3 bytes"):
        list(source.rows())


def test_a_data_set_among_files_is_no_file_of_rows(place: Place) -> None:
    place.write("a.jsonl", ROWS)
    nested = save(place.data / "deep" / "saved", ROWS)
    with pytest.raises(ValueError, match=f"{nested} holds a data set of save_to_disk"):
        place.run()
    (nested / "state.json").unlink()
    (nested / "data-00000-of-00001.arrow").unlink()
    (nested / "dataset_info.json").write_text(json.dumps(ROWS))  # a name that means nothing
    place.run()
    assert place.names() == ["a.jsonl", "deep__saved__dataset_info.json"]


def test_names_that_collide_are_refused(place: Place) -> None:
    one, other = save(place.root / "x" / "saved", ROWS), save(place.root / "y" / "saved", ROWS)
    with pytest.raises(ValueError, match="would both be saved__train"):
        find_all_sources([one, other], None, "train")
    assert len(find_all_sources([one, Path(f"hub:{one}")], None, "train")) == 1


def test_the_output_may_not_lie_in_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lies within the source hub:"):
        require_apart(tmp_path / "data" / "out", [Path(f"hub:{tmp_path / 'data'}")])
    require_apart(tmp_path / "out", [tmp_path / "data", Path("hub:somebody/talks")])


def test_a_tokenizer_is_trained_on_a_data_set(place: Place) -> None:
    rows = [{"instruction": f"counting {k} apples", "response": "is easy"} for k in range(50)]
    place.write("a.jsonl", rows)
    made = []
    for name, source in (
        ("of_files", place.data),
        ("of_saved", save(place.root / "saved", rows)),
        ("of_hub", f"hub:{place.data}"),
    ):
        train_tokenizer([str(source), "-o", str(place.root / name), "--vocab-size", "310"])
        made.append((place.root / name / "tokenizer.json").read_bytes())
    assert made[0] == made[1] == made[2]
