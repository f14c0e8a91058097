"""A bundle is read as it stands, and says what is wrong with it; an archive stays in its folder."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_cases import BASELINES, TASKS, write_bundle

from evaluation.core import archive
from evaluation.core.archive import fetch_bundle, unpack
from evaluation.core.bundle import Bundle, Example
from evaluation.fetch import main as fetch_main


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_bundle_has_its_tasks_baselines_and_rows(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert [entry.label for entry in opened.chosen([])] == ["colours", "pronouns", "endings"]
    colours, pronouns, endings = opened.entries
    assert (colours.num_fewshot, colours.continuation_delimiter) == (3, "\nA: ")
    assert (pronouns.num_fewshot, pronouns.continuation_delimiter) == (0, " ")
    assert opened.baselines == {"colours": 25, "pronouns": 50, "endings": 0}
    assert opened.examples(colours)[1] == Example(("Q: blue?",), ("rose", "sky", "grass"), 1)
    assert opened.examples(pronouns)[2] == Example(("He ran; he", "He sat; he"), ("hid",), 1)
    assert opened.examples(endings)[0] == Example((" one two ",), ("three",), 0)
    with pytest.raises(ValueError, match=r"'colors' is no task of .*; it has colours, pronouns"):
        opened.chosen(["colors"])


def changed_task(**changes: Any) -> Callable[[Path], object]:
    tasks = [{**TASKS[0], **changes}, *TASKS[1:]]
    return lambda folder: (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))


def wrote(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


COLOURS_FILE = "eval_data/world/colours.jsonl"


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (removed("core.yaml"), "core.yaml is missing in the bundle; `python -m evaluation.fetch"),
        (removed("eval_meta_data.csv"), "eval_meta_data.csv is missing"),
        (removed(COLOURS_FILE), "colours.jsonl is missing"),
        (wrote("core.yaml", "icl_tasks: [a: b: c"), "core.yaml is no YAML"),
        (wrote("core.yaml", "!!python/object/apply:os.system [true]"), "is no YAML"),
        (wrote("core.yaml", "[1, 2]"), "no list icl_tasks"),
        (wrote("core.yaml", "icl_tasks: []"), "no list icl_tasks"),
        (wrote("core.yaml", "icl_tasks: [7]"), "icl_tasks 1: the entry"),
        (wrote("core.yaml", "#" * (1 << 21)), "2,097,152 bytes"),
        (changed_task(icl_task_type="essay"), "icl_tasks 1: icl_task_type: Input should be 'mul"),
        (changed_task(num_fewshot=[1, 5]), "icl_tasks 1: num_fewshot"),
        (changed_task(label="endings"), "lists endings twice"),
        (changed_task(label="colors"), "no random baseline of colors"),
        (changed_task(dataset_uri="../core.yaml"), "leads out of"),
        (changed_task(dataset_uri="/etc/passwd"), "leads out of"),
        (changed_task(dataset_uri="world"), "world is missing"),
        (wrote("eval_meta_data.csv", "a,b\n1,2\n"), "no columns 'Eval Task'"),
        (wrote("eval_meta_data.csv", ""), "no columns 'Eval Task'"),
        (wrote("eval_meta_data.csv", BASELINES.replace("25", "many")), "row 2: 'many' is no num"),
        (wrote("eval_meta_data.csv", BASELINES.replace("25", "100")), "row 2: 100 is no per cent"),
        (wrote("eval_meta_data.csv", BASELINES.replace("25", "nan")), "row 2: nan is no per cent"),
        (wrote(COLOURS_FILE, ""), "has no rows"),
        (wrote(COLOURS_FILE, "{"), "colours.jsonl:1 is no JSON"),
        (wrote(COLOURS_FILE, '{"query": 3, "choices": ["a", "b"], "gold": 0}'), "query=3 is no st"),
        (wrote(COLOURS_FILE, '{"query": "a", "choices": ["a"], "gold": 0}'), "two or more texts"),
        (wrote(COLOURS_FILE, '{"query": "a", "choices": ["a", "b"], "gold": 2}'), "gold=2 is none"),
        (wrote(COLOURS_FILE, '{"query": "a", "choices": ["a", " "], "gold": 0}'), "empty contin"),
        (wrote(COLOURS_FILE, '{"query": "a", "choices": ["a", "b"]}'), "no column 'gold'"),
    ],
)
def test_a_broken_bundle_is_named(
    bundle: Path, break_it: Callable[[Path], object], told: str
) -> None:
    break_it(bundle)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        opened = Bundle.open(bundle)
        for entry in opened.entries:
            opened.examples(entry)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}")
    (bundle / COLOURS_FILE).unlink()
    (bundle / COLOURS_FILE).symlink_to(outside)
    opened = Bundle.open(bundle)
    with pytest.raises(ValueError, match="leads out of"):
        opened.file_of(opened.entries[0])


def zipped(bundle: Path, archive_file: Path, inside: str = "eval_bundle/") -> Path:
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(bundle.rglob("*")):
            if path.is_file():
                file.write(path, f"{inside}{path.relative_to(bundle)}")
        file.writestr("__MACOSX/eval_bundle/._core.yaml", "x")
    return archive_file


@pytest.mark.parametrize("inside", ["eval_bundle/", ""])
def test_fetch_unpacks_a_bundle_once(
    bundle: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = zipped(bundle, tmp_path / "b.zip", inside)
    target = tmp_path / "made" / "core"
    command = [f"bundle={target}", f"bundle_from={file}"]
    fetch_main(command)
    assert "3 tasks" in capsys.readouterr().out
    contents = {
        path.relative_to(target): path.read_text() for path in target.rglob("*") if path.is_file()
    }
    expected = {
        path.relative_to(bundle): path.read_text() for path in bundle.rglob("*") if path.is_file()
    }
    assert contents.items() >= expected.items()
    assert [path.name for path in target.parent.iterdir()] == ["core"]
    file.unlink()
    fetch_main(command)
    assert "is there" in capsys.readouterr().out


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "told"),
    [
        ("../outside.txt", "leads out of the folder"),
        ("a/../../outside.txt", "leads out of the folder"),
        ("/tmp/outside.txt", "leads out of the folder"),
        ("C:outside.txt", "leads out of the folder"),
        (link("eval_bundle/link"), "is a link"),
    ],
)
def test_an_unsafe_archive_writes_nothing(
    bundle: Path, tmp_path: Path, member: str | zipfile.ZipInfo, told: str
) -> None:
    file = zipped(bundle, tmp_path / "b.zip")
    with zipfile.ZipFile(file, "a") as archive_file:
        archive_file.writestr(member, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=told):
        fetch_bundle(tmp_path / "made", str(file))
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_that_are_too_big_broken_or_no_bundle_are_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zipped(bundle, tmp_path / "b.zip")
    made = tmp_path / "made"
    content = file.read_bytes()
    for broken in (b"no archive", content[: len(content) // 2]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="no whole zip archive"):
            fetch_bundle(made, str(file))
    file.write_bytes(content)
    monkeypatch.setattr(archive, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100"):
        unpack(file, tmp_path / "x")
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"holds no core\.yaml"):
        fetch_bundle(made, str(file))
    with pytest.raises(FileNotFoundError, match=r"bundle_from=.* is no file"):
        fetch_bundle(made, str(tmp_path / "none.zip"))
    with pytest.raises(FileNotFoundError, match=r"not to be had from http://127\.0\.0\.1:9/b"):
        fetch_bundle(made, "http://127.0.0.1:9/b.zip")
    assert not made.exists()
    with pytest.raises(ValueError, match="holds no bundle"):
        fetch_bundle(tmp_path, str(file))
