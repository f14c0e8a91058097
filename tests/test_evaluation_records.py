"""The folder of an evaluation: what is kept, what is moved aside, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.answer_log import Given, LogWriter, logged_labels, read_logs
from evaluation.benchmarks.protocol import Item, Verdict
from evaluation.records import (
    ResultsFolder,
    changed_settings,
    folder_name,
    open_results,
    require_name,
)

MODEL = {"path": "run", "checkpoint": "fsdp2_epoch_2", "epoch": 2, "step": 40, "weights": "ema"}
MODEL |= {"dtype": "float32", "weights_fingerprint": "aa"}


def header(*labels: str, model: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """With the same settings for all benchmarks."""
    plan = {"generation": {"max_context": 64}, **settings}
    return {
        "name": "x",
        "model": {**MODEL, **(model or {})},
        "engine": "SimpleEngine",
        "started_at": "now",
        "seconds": 1.0,
        "settings": {"seed": 0, "benchmarks": dict.fromkeys(labels, plan)},
    }


def opened(path: Path, *labels: str, **given: Any) -> ResultsFolder:
    return open_results(path, header(*labels, **given), labels)


def finish(folder: ResultsFolder, label: str, *ids: str) -> None:
    lines = [{"benchmark": label, "id": each} for each in ids]
    folder.add(label, {"n": len(ids)}, lines)


def order_of(path: Path) -> list[str]:
    lines = (path / "items.jsonl").read_text().splitlines()
    return [json.loads(line)["benchmark"] + json.loads(line)["id"] for line in lines]


def test_benchmarks_stand_in_the_order_asked_whichever_is_finished_first(tmp_path: Path) -> None:
    folder = opened(tmp_path / "x", "A", "B")
    finish(folder, "B", "1")
    stored = json.loads((tmp_path / "x/results.json").read_text())
    assert (list(stored["benchmarks"]), stored["unfinished"]) == (["B"], ["A"])
    finish(folder, "A", "1", "2")
    stored = json.loads((tmp_path / "x/results.json").read_text())
    assert (list(stored["benchmarks"]), stored["unfinished"]) == (["A", "B"], [])
    assert order_of(tmp_path / "x") == ["A1", "A2", "B1"]


def test_another_benchmark_joins_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(opened(tmp_path / "x", "A"), "A", "1")
    folder = opened(tmp_path / "x", "B")
    assert list(folder.finished) == ["A"]
    finish(folder, "B", "1")
    stored = json.loads((tmp_path / "x/results.json").read_text())
    assert list(stored["settings"]["benchmarks"]) == list(stored["benchmarks"]) == ["A", "B"]
    assert stored["seconds"] == 2.0
    assert order_of(tmp_path / "x") == ["A1", "B1"]
    assert capsys.readouterr().out == ""


def test_other_settings_start_anew_and_keep_the_old_folder_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(opened(tmp_path / "x", "A", "C"), "A", "1")
    folder = opened(tmp_path / "x", "A", "B", generation={"max_context": 32})
    assert not folder.finished and not (tmp_path / "x/items.jsonl").exists()
    (kept,) = tmp_path.glob("x.*")
    assert order_of(kept) == ["A1"]
    told = capsys.readouterr().out
    assert "generation.max_context=64, now 32 (A)): starting anew" in told
    assert str(kept) in told and told.count("\n") == 1


def test_settings_of_a_benchmark_without_answers_may_change(tmp_path: Path) -> None:
    finish(opened(tmp_path / "x", "A", "C"), "A", "1")
    opened(tmp_path / "x", "C", generation={"max_context": 32})
    assert not list(tmp_path.glob("x.*"))
    writer = LogWriter(tmp_path / "x", 0)
    writer.answer("C", Item("1", "", ""), Given("a", "stop", 1, ""))
    opened(tmp_path / "x", "C", generation={"max_context": 16})
    assert len(list(tmp_path.glob("x.*"))) == 1


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"checkpoint": "fsdp2_epoch_1", "epoch": 1}, "epoch=2 .now 1."),
        ({"weights": "raw"}, "weights=ema .now raw."),
        ({"weights_fingerprint": "bb"}, "weights_fingerprint=aa .now bb."),
    ],
)
def test_results_of_another_checkpoint_are_refused(
    tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    finish(opened(tmp_path / "x", "A"), "A", "1")
    before = (tmp_path / "x/results.json").read_bytes()
    with pytest.raises(ValueError, match=f"another checkpoint: .*{told}.*Give name="):
        opened(tmp_path / "x", "A", model=model)
    assert (tmp_path / "x/results.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_was_moved_and_a_new_precision_are_no_other_checkpoint(tmp_path: Path) -> None:
    finish(opened(tmp_path / "x", "A"), "A", "1")
    model = {"path": "elsewhere", "dtype": "bfloat16", "weights_fingerprint": "bb"}
    assert list(opened(tmp_path / "x", "A", model=model).finished) == ["A"]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/items.jsonl").touch()
    with pytest.raises(ValueError, match=r"has items but no results\.json"):
        opened(tmp_path / "x", "A")
    for content in ("{", "[]", '{"format": 2}'):
        (tmp_path / "x/results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results\.json .*give another name="):
            opened(tmp_path / "x", "A")


def test_logs_stay_while_they_hold_what_is_not_finished(tmp_path: Path) -> None:
    folder = opened(tmp_path / "x", "A", "B")
    writer = LogWriter(tmp_path / "x", 3)
    for label in ("A", "B"):
        writer.answer(label, Item("1", "", ""), Given("text", "stop", 2, "digest"))
    finish(folder, "A", "1")
    folder.remove_logs()
    assert logged_labels(read_logs(tmp_path / "x")) == {"A", "B"}
    finish(folder, "B", "1")
    folder.remove_logs()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "items.jsonl",
        "results.json",
    ]


def test_answers_and_verdicts_come_back_from_the_log_as_they_were(tmp_path: Path) -> None:
    writer, item = LogWriter(tmp_path, 0), Item("test/1", "", "")
    given = Given("half \ud800 and \u2028 line\nbreaks", "length", 7, "digest")
    verdict = Verdict(None, 0.25, True, robust=0.0, problem="slow", detail={"em": 0.1, "l": [1]})
    writer.answer("A", item, given)
    writer.verdict("A", item, verdict)
    log = read_logs(tmp_path)
    assert log.answers == {("A", "test/1"): given}
    assert log.verdicts == {("A", "test/1"): verdict}
    writer.answer("A", item, given)  # asked anew: the verdict was of the earlier answer
    assert read_logs(tmp_path).verdicts == {}


def test_a_change_is_told_once_for_all_benchmarks_that_it_concerns() -> None:
    before, now = (
        header("A", "B")["settings"],
        header("A", "B", generation={"stop": "x"})["settings"],
    )
    assert changed_settings(before, now) == [
        "generation.max_context=64, now null (A, B)",
        'generation.stop=null, now "x" (A, B)',
    ]
    assert changed_settings(before, {**before, "seed": 1}) == ["seed=0, now 1"]
    assert changed_settings(before, before) == []


def test_names_of_folders() -> None:
    assert folder_name("org/model-1.5B") == "org__model-1.5B"
    assert folder_name("../..") == "__.."
    assert require_name("published") == "published"
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ValueError, match="names a folder"):
            require_name(name)
