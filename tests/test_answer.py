"""scripts/answer.py: every question of a file is answered once, however often it is stopped."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking_cases import MAX_CONTEXT, Program, assert_refused, write_run

from inference.answer_file import AnswerFile
from scripts import answer
from simple_inference_engine import InferenceEngine, ModelOptions, Request, Sampling, load_model

ROOT = Path(__file__).parent.parent
LIMIT = "max_output_tokens=6"
KEYS = ["index", "prompt", "condition", "answer", "truth", "finish_reason"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def ask(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(answer.main, monkeypatch, capsys, (f"ckpt_path={run}", "batch_size=3"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Ten rows: one too long, one with a condition, two with a truth of which one is right."""
    rows: list[dict[str, Any]] = [{"instruction": f"q{number} 🙂\n"} for number in range(10)]
    rows[3] = {"prompt": "x" * MAX_CONTEXT, "response": "y"}
    rows[5] |= {"condition": "synth,cot"}
    rows[7] |= {"response": "never said"}
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Makes the engine stop as Ctrl-C would, once it has given so many answers."""
    stream = InferenceEngine.stream

    def stopping(num_answers: int) -> None:
        def until(self: InferenceEngine, requests: Iterable[Request]) -> Iterator[Any]:
            left = num_answers
            for event in stream(self, requests):
                if isinstance(event, answer.Token):
                    yield event
                elif left == 0:
                    raise KeyboardInterrupt
                else:
                    left -= 1
                    yield event

        monkeypatch.setattr(InferenceEngine, "stream", until if num_answers >= 0 else stream)

    yield stopping


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_row_is_answered_in_the_order_of_the_file(
    run: Path, ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    done = ask(f"input={questions}", f"output={output}", LIMIT)
    assert done.code == 0
    lines = lines_of(output)
    assert [line["index"] for line in lines] == list(range(10))
    assert all(list(line) == KEYS for line in lines)
    assert lines[5]["condition"] == "synth,cot" and lines[4]["condition"] == "direct"
    loaded = load_model(ModelOptions(ckpt_path=run))
    asked = [(line["condition"], line["prompt"]) for line in lines]
    for expected in loaded.engine.generate(asked, loaded.prompt_format, max_new_tokens=6):
        line = lines[expected.index]
        assert line["finish_reason"] == expected.finish_reason
        assert line["answer"] == (expected.text if expected.index != 3 else None)
    assert (lines[3]["finish_reason"], lines[3]["truth"]) == ("prompt_too_long", "y")
    assert "9 of 10 answered" in done.stdout
    assert "have no answer: index 3\n" in done.stdout
    assert "0 of 2 are exactly the truth (0.0%)" in done.stdout
    assert "10/10" in done.stderr and "answers/s" in done.stderr


def test_sampled_answers_are_those_of_the_engine(
    run: Path, ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    ask(f"input={questions}", f"output={output}", "temperature=2", "seed=5", LIMIT)
    lines, loaded = lines_of(output), load_model(ModelOptions(ckpt_path=run))
    expected = loaded.engine.generate(
        [(line["condition"], line["prompt"]) for line in lines],
        loaded.prompt_format,
        max_new_tokens=6,
        sampling=Sampling(temperature=2, seed=5),
    )
    texts = {each.index: each.text for each in expected}
    assert [line["answer"] or "" for line in lines] == [texts[index] for index in range(10)]


def test_right_answers_are_counted(ask: Program, questions: Path, tmp_path: Path) -> None:
    ask(f"input={questions}", f"output={tmp_path / 'a.jsonl'}", LIMIT)
    lines = [line for line in lines_of(tmp_path / "a.jsonl") if line["answer"] is not None]
    rows = [{"prompt": line["prompt"], "response": line["answer"]} for line in lines[:3]]
    rows += [{"prompt": lines[0]["prompt"], "response": "z"}, {"prompt": "no truth"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = ask(f"input={tmp_path / 'b.jsonl'}", f"output={tmp_path / 'c.jsonl'}", LIMIT)
    assert "3 of 4 are exactly the truth (75.0%)" in done.stdout


def test_a_stopped_run_goes_on_to_the_same_answers(
    ask: Program, questions: Path, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    settings = (f"input={questions}", "temperature=1", "seed=5", LIMIT)
    ask(*settings, f"output={tmp_path / 'whole.jsonl'}")
    output = tmp_path / "parts.jsonl"
    stop_after(4)
    stopped = ask(*settings, f"output={output}")
    assert stopped.code == 130 and "stopped with 6 to go" in stopped.stderr
    assert len(lines_of(output)) == 4
    with output.open("ab") as file:
        file.write(output.read_bytes().splitlines()[0][:20])  # a line that a kill cut off
    stop_after(2)
    assert "4 of 10 are answered already" in ask(*settings, f"output={output}").stdout
    stop_after(-1)
    done = ask(*settings, f"output={output}")
    assert "6 of 10 are answered already" in done.stdout and done.code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    again = ask(*settings, f"output={output}")
    assert "10 of 10 are answered already" in again.stdout and "9 of 10 answered" in again.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_limit_answers_the_first_rows_and_may_be_raised(
    ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    for limit, total in ((2, 2), (5, 5), (3, 5), (99, 10)):
        ask(f"input={questions}", f"output={output}", f"limit={limit}", LIMIT)
        assert [line["index"] for line in lines_of(output)] == list(range(total))


def test_other_settings_are_refused_with_the_way_out(
    ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    settings = (f"input={questions}", f"output={output}", LIMIT)
    ask(*settings)
    before = files_in(tmp_path)
    assert_refused(ask(*settings, "temperature=0.5"), "temperature=0.0 (now 0.5)", "output=")
    assert_refused(ask(*settings, "L_cycles=1"), "L_cycles=3 (now 1)")
    assert_refused(ask(*settings, "condition=cot"), "condition=None (now cot)")
    assert files_in(tmp_path) == before
    questions.write_text('{"prompt": "another"}')
    assert_refused(ask(*settings), "fingerprint=")
    (tmp_path / "out.jsonl.settings.json").unlink()
    assert_refused(ask(*settings), "out.jsonl exists without out.jsonl.settings.json")


def test_a_condition_given_is_that_of_all_rows(
    ask: Program, questions: Path, tmp_path: Path
) -> None:
    ask(f"input={questions}", f"output={tmp_path / 'o.jsonl'}", "condition=cot", LIMIT)
    assert {line["condition"] for line in lines_of(tmp_path / "o.jsonl")} == {"cot"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"prompt": "a"}\n{"prompt": 1}', "rows.jsonl:2: prompt=1 is no text"),
        ('{"prompt": "a"}\n{"prompt": "b", "condition": "foo"}', "row 2 of"),
        ("\n\n", "has no rows"),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(
    ask: Program, tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    done = ask(f"input={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out.jsonl'}")
    assert_refused(done, told)
    assert list(files_in(tmp_path)) == ["rows.jsonl"]


def test_options_that_do_not_go_together_are_refused(
    ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = f"output={tmp_path / 'out.jsonl'}"
    for arguments, told in (
        ([output], "either input=FILE.jsonl or data.path=FOLDER"),
        ([output, f"input={questions}", "data.path=x"], "either input="),
        ([output, f"input={questions}", "split=test"], "a file has no splits"),
        ([output, "data.path=x", "condition=cot"], "sampled prompts have theirs"),
        ([output, "input=nowhere.jsonl"], "nowhere.jsonl is no file"),
        ([output, "data.path=nowhere"], "nowhere is no folder of sampled data"),
        ([f"input={questions}", f"output={questions}"], "is the input too"),
        ([f"input={questions}", "output=no/folder/x.jsonl"], "no/folder is no folder"),
        ([f"input={questions}"], "output=... is required"),
    ):
        assert_refused(ask(*arguments), told)


def test_a_line_that_is_none_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    AnswerFile(path, {"seed": 1}).add({"index": 4})
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(ValueError, match=r"out.jsonl:2 is no line of answers"):
        AnswerFile(path, {"seed": 1})
    assert path.read_bytes() == b'{"index": 4}\nnonsense\n'


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(run: Path, tmp_path: Path) -> None:
    rows = (json.dumps({"instruction": f"row {number}"}) for number in range(60))
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    settings = [f"ckpt_path={run}", f"input={tmp_path / 'in.jsonl'}", "batch_size=1", LIMIT]
    command = [sys.executable, str(ROOT / "scripts/answer.py"), *settings]
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen([*command, f"output={output}"], cwd=tmp_path)
    while not output.exists() or output.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, f"output={output}"], cwd=tmp_path, check=True)
    subprocess.run([*command, f"output={tmp_path / 'whole.jsonl'}"], cwd=tmp_path, check=True)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(lines_of(output)) == 60


def test_a_file_that_another_process_writes_is_refused(
    ask: Program, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    with (tmp_path / ".answers.jsonl.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(ask(f"input={questions}", f"output={output}"), "by another process")
    assert not output.exists()
