"""Published data sets become rows to train on; what is dropped is counted by its reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from source_tree import ROOT

from data_io.clean import CleanOptions, main
from data_io.cleaning import SOURCES
from data_io.compare_tokenizers import CompareOptions
from data_io.records import BadRowError, Row
from data_io.trm_template import TemplateOptions

SOLVED = {
    "question": "Ann has 1,500 nuts and eats half. How many are left? ",
    "answer": "She eats 1500/2 = <<1500/2=750>>750 nuts.\nSo <<1500-750=750>>750 stay.\n#### 750",
}
PROBLEM = {
    "problem": "What is $1 + 1$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "We add: $1 + 1 = \\boxed{2}$.",
}


def chat(*texts: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": role, "content": text} for role, text in texts]
    return {"prompt": "p", "prompt_id": "1", "category": "Chat", "messages": messages}


def test_gsm8k_loses_its_marks_and_boxes_the_integer() -> None:
    assert SOURCES["gsm8k"].clean(SOLVED) == Row(
        "cot",
        "Ann has 1,500 nuts and eats half. How many are left?",
        "She eats 1500/2 = 750 nuts.\nSo 750 stay.\n\\boxed{750}",
    )
    large = SOLVED | {"answer": "Much.\n#### 1,234,567"}
    assert SOURCES["gsm8k"].clean(large).response == "Much.\n\\boxed{1234567}"


def test_what_the_scoring_reads_is_the_published_answer() -> None:
    from evaluation.benchmarks.gsm8k import gold_integer
    from evaluation.scoring import published_integer

    cleaned = SOURCES["gsm8k"].clean(SOLVED)
    assert published_integer(cleaned.response) == gold_integer(SOLVED, "row") == 750


def test_math_stays_as_it_is() -> None:
    expected = Row("cot", PROBLEM["problem"], PROBLEM["solution"])
    assert SOURCES["math"].clean(PROBLEM) == expected


def test_no_robots_gives_the_first_exchange_behind_its_system() -> None:
    turns = (("user", "Hi "), ("assistant", "Hello."), ("user", "And?"), ("assistant", "So."))
    assert SOURCES["no_robots"].clean(chat(*turns)) == Row("direct", "Hi", "Hello.")
    with_system = chat(("system", "Be kind."), *turns)
    assert SOURCES["no_robots"].clean(with_system) == Row("direct", "Be kind.\n\nHi", "Hello.")


@pytest.mark.parametrize(
    ("source", "fields", "reason"),
    [
        ("gsm8k", {"question": "a"}, "missing field"),
        ("gsm8k", SOLVED | {"question": 1}, "field is no text"),
        ("gsm8k", SOLVED | {"question": " "}, "empty question"),
        ("gsm8k", SOLVED | {"answer": "750"}, "no final answer"),
        ("gsm8k", SOLVED | {"answer": "So.\n#### half"}, "final answer is no integer"),
        ("gsm8k", SOLVED | {"answer": "#### 3"}, "no solution"),
        ("gsm8k", SOLVED | {"answer": "\ud800\n#### 3"}, "half of a surrogate pair"),
        ("math", PROBLEM | {"solution": "It is 2."}, "no boxed answer"),
        ("math", PROBLEM | {"solution": ""}, "no solution"),
        ("math", PROBLEM | {"problem": ""}, "empty problem"),
        ("no_robots", chat(("user", "Hi")), "no assistant turn"),
        ("no_robots", chat(("user", " "), ("assistant", "Hello.")), "empty question"),
        ("no_robots", chat(("user", "Hi"), ("assistant", " ")), "empty answer"),
    ],
)
def test_what_is_dropped_has_a_reason(source: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as told:
        SOURCES[source].clean(fields)
    assert told.value.reason == reason


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_writes_rows_and_counts_the_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"question": "Why?", "answer": "Because."}
    source = write_rows(tmp_path / "train.jsonl", SOLVED, bad, bad, SOLVED)
    output = tmp_path / "deep" / "gsm8k_train.jsonl"
    main(["source=gsm8k", f"output={output}", f"input={source}"])
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["condition"] for row in rows] == ["cot", "cot"]
    assert out == ""
    assert "train.jsonl, line 2 is dropped: no final answer" in err
    assert "dropped: 2 rows, no final answer" in err


def test_held_out_files_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    train = write_rows(folder / "train-00000-of-00001.jsonl", SOLVED)
    write_rows(folder / "test-00000-of-00001.jsonl", SOLVED)
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.jsonl of the input looks held out"):
        main(["source=gsm8k", f"output={output}", f"input={folder}"])
    assert not output.exists()
    main(["source=gsm8k", f"output={output}", f"input={train}"])
    assert output.exists()


def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", SOLVED)
    output = tmp_path / "out" / "rows.jsonl"
    with pytest.raises(ValueError, match=r"no row can be used \(1 missing field\)"):
        main(["source=math", f"output={output}", f"input={source}"])
    source.write_text(source.read_text() + '{"question":\n')
    with pytest.raises(ValueError, match=r"line 2 is no JSON"):
        main(["source=gsm8k", f"output={output}", f"input={source}"])
    assert list(output.parent.iterdir()) == []


def test_an_output_that_exists_is_kept_unless_asked(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "train.jsonl", SOLVED)
    output = write_rows(tmp_path / "rows.jsonl", {"mine": 1})
    with pytest.raises(ValueError, match=r"rows\.jsonl exists; delete it"):
        main(["source=gsm8k", f"output={output}", f"input={source}"])
    assert json.loads(output.read_text()) == {"mine": 1}
    main(["source=gsm8k", f"output={output}", f"input={source}", "overwrite=true"])
    assert "boxed" in output.read_text()


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source=alpaca is none of gsm8k, math, no_robots"):
        main(["source=alpaca", f"output={tmp_path / 'a.jsonl'}"])


@pytest.mark.parametrize(
    ("module", "record", "bad"),
    [
        ("clean", CleanOptions, ("source=gsm8k", "output=out.jsonl", "input=gone.jsonl")),
        ("trm_template", TemplateOptions, ("input=gone.jsonl", "output=out")),
        ("compare_tokenizers", CompareOptions, ("tokenizer=gone.json",)),
    ],
)
def test_commands_explain_themselves_and_refuse_in_one_line(
    tmp_path: Path, module: str, record: type[BaseModel], bad: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", f"data_io.{module}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = [
        subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True)
        for arguments in (("--help",), bad)
    ]
    assert [done.returncode for done in told] == [0, 2]
    shown = told[0].stdout.decode()
    assert all(f"\n  {name} " in shown for name in record.model_fields)
    assert max(map(len, shown.splitlines())) <= 100
    assert told[1].stdout == b""
    assert told[1].stderr.startswith(b"error: ")
    assert told[1].stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []
