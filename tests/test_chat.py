"""scripts/chat.py: one answer and nothing else on standard output, or a chat with commands."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking_cases import LETTERS, MAX_CONTEXT, Program, Scripted, prompt_format, write_run

from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from scripts import chat
from simple_inference_engine import InferenceEngine, ModelOptions, load_model

ROOT = Path(__file__).parent.parent
DIRECT, COT = CONDITION_TOKENS["direct"], CONDITION_TOKENS["cot"]
HOSTILE = [
    *('say "hi"', "it's", "a=b=c", "two\nlines\n", "null", "${HOME} $(id)", "é 漢字 🙂"),
    *(f"{BOQ}{EOA}{EOQ}", "--help", "/help", "[1,2]", "{a: 1}", " spaced "),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def ask(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(chat.main, monkeypatch, capsys, (f"ckpt_path={run}", "max_output_tokens=12"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Every question is answered with the same text."""
    said = Scripted.saying("ok 🙂")
    monkeypatch.setattr(InferenceEngine, "stream", lambda *given: said(*given))
    return said


def engine_answer(run: Path, text: str, condition: str = "direct", **options: Any) -> str:
    loaded = load_model(ModelOptions(ckpt_path=run, **options))
    prompts = [(condition, text)]
    (answer,) = loaded.engine.generate(prompts, loaded.prompt_format, max_new_tokens=12)
    return answer.text


def test_a_message_gives_its_answer_on_standard_output_and_nothing_else(
    run: Path, ask: Program
) -> None:
    for condition in ("direct", "synth,cot"):
        done = ask("message=abc", f"condition={condition}")
        expected = engine_answer(run, "abc", condition)
        assert expected and set(expected) <= set(LETTERS)
        assert (done.code, done.stdout) == (0, f"{expected}\n")
        assert "fsdp2_epoch_2" in done.stderr


def test_a_prompt_on_standard_input_is_answered_alike(run: Path, ask: Program) -> None:
    assert ask(stdin=b"abc\n").stdout == ask("message=abc").stdout == ask(stdin=b"abc").stdout
    assert ask("message=abc", stdin=b"ignored").stdout == ask("message=abc").stdout


@pytest.mark.parametrize("text", HOSTILE)
def test_text_reaches_the_model_as_it_stands(ask: Program, scripted: Scripted, text: str) -> None:
    assert ask(f"message={text}").stdout == "ok 🙂\n"
    ask(stdin=f"{text}\n".encode())
    encoded = prompt_format().encode_prompt("direct", text)
    assert [list(each.prompt_ids) for each in scripted.requests] == [encoded, encoded]


def test_system_text_and_shots_stand_before_the_question(
    ask: Program, scripted: Scripted, tmp_path: Path
) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(
        '{"instruction": "1+1", "response": "2"}\n\n{"prompt": "2+1", "response": "3"}\n'
        '{"instruction": "not used", "response": "x"}\n'
    )
    settings = ("condition=cot", f"shots={shots}", "num_shots=2")
    ask("message=3+1", "system=Add.", *settings)
    ask("message=3+1", *settings)
    examples = "1+1\n2\n\n2+1\n3\n\n"
    assert scripted.prompts() == [
        f"{BOQ}{COT}Add.\n\n{examples}3+1{EOQ}",
        f"{BOQ}{COT}{examples}3+1{EOQ}",
    ]


def test_settings_reach_the_request(ask: Program, scripted: Scripted) -> None:
    ask("message=a", "temperature=0.7", "top_k=5", "top_p=0.9", "seed=3")
    (request,) = scripted.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.7, 5, 0.9, 3)
    assert (request.max_new_tokens, request.stop_ids) == (12, {prompt_format().eoa_id})


def test_verbose_steps_go_beside_the_answer(run: Path, ask: Program) -> None:
    done = ask("message=abc", "verbose=true")
    answer = engine_answer(run, "abc")
    assert done.stdout == f"{answer}\n"
    steps = [line for line in done.stderr.splitlines() if "|" in line]
    assert len(steps) == len(answer)
    for number, (letter, line) in enumerate(zip(answer, steps, strict=True), 1):
        chosen, _, likely = line.partition("|")
        assert chosen.split() == [str(number), f"'{letter}'", likely.split()[1]]
        assert likely.split()[0] == f"'{letter}'" and len(likely.split()) == 2 * chat.TOP_TOKENS


def test_an_answer_that_is_cut_off_is_said_to_be(run: Path, ask: Program) -> None:
    whole = engine_answer(run, "abc")
    assert len(whole) > 2
    limited = replace(ask, arguments=(f"ckpt_path={run}", "max_output_tokens=2"))
    done = limited("message=abc")
    assert done.stdout == f"{whole[:2]}\n"
    assert "(cut off after 2 tokens: max_output_tokens=2)" in done.stderr
    filled = replace(ask, arguments=(f"ckpt_path={run}",))(f"message={'b' * (MAX_CONTEXT - 5)}")
    assert "(cut off after 2 tokens: the context is full)" in filled.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["message=a", "condition=foo"], ["'foo'", "cot", "direct", "noisy", "synth"]),
        (["message="], ["no question"]),
        ([f"message={'x' * 80}"], ["83 tokens", f"context of {MAX_CONTEXT}", "shorten"]),
        (["mesage=a"], ["did you mean message?"]),
        (["message=a", "temperature=-1"], ["temperature=-1.0", "0 (greedy)"]),
        (["message=a", "top_p=0"], ["top_p=0.0"]),
        (["message=a", "shots=nowhere.jsonl"], ["nowhere.jsonl is no file"]),
        (["message=a", "L_cycles=0"], ["L_cycles=0"]),
        (["message=a", "cycles=2"], ["cycles=2", "H_cycles, L_cycles"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    ask: Program, arguments: list[str], told: list[str]
) -> None:
    done = ask(*arguments)
    assert (done.code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("loaded")]
    assert line.startswith("error: ")
    for text in told:
        assert text in line


def test_standard_input_that_is_no_prompt_is_refused(ask: Program) -> None:
    for content, told in ((b"", "no question"), (b"\xff\xfe", "no UTF-8")):
        done = ask(stdin=content)
        assert (done.code, done.stdout) == (2, "") and told in done.stderr


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ('{"instruction": "a", "response": "b"}', "has 1 rows; use num_shots=1"),
        ('{"instruction": "a"}\n' * 4, "rows [1, 2, 3, 4] have no response"),
        ("[1]", "shots.jsonl:1: [1] is no object"),
    ],
)
def test_shots_that_are_none_are_refused(
    ask: Program, tmp_path: Path, rows: str, told: str
) -> None:
    (tmp_path / "shots.jsonl").write_text(rows)
    done = ask("message=a", f"shots={tmp_path / 'shots.jsonl'}")
    assert done.code == 2 and told in done.stderr


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        done = Program(chat.main, monkeypatch, capsys, (f"ckpt_path={path}",))("message=a")
        assert done.code == 2 and str(path) in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_single_question_with_130(
    ask: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Scripted(40, KeyboardInterrupt)
    monkeypatch.setattr(InferenceEngine, "stream", lambda *given: stopped(*given))
    assert ask("message=a").code == 130


def test_messages_of_a_chat_stand_alone_unless_history_is_on(
    ask: Program, scripted: Scripted
) -> None:
    done = ask(typed=["one", "two", "/history on", "three", "/reset", "four", "/history off", "5"])
    assert (done.code, done.stderr) == (0, "")
    assert "each message stands alone" in done.stdout
    turn = f"{BOQ}{DIRECT}%s{EOQ}"
    with_answer = turn + f"ok 🙂{EOA}"
    assert scripted.prompts() == [
        *(turn % "one", turn % "two"),
        with_answer % "one" + with_answer % "two" + turn % "three",
        *(turn % "four", turn % "5"),
    ]
    scripted.requests.clear()
    ask("history=true", "system=S", typed=["one", "two"])
    assert scripted.prompts()[1] == with_answer % "S\n\none" + turn % "two"


def test_commands_change_what_the_next_question_is_asked_with(
    ask: Program, scripted: Scripted
) -> None:
    lines = ["/condition cot", "/system Be = brief", "/temperature 0.5", "/top_k 3", "/top_p 0.8"]
    done = ask(typed=[*lines, "/seed 9", "/max_output_tokens 7", "hi", "//hi", "/quit", "never"])
    assert scripted.prompts() == [f"{BOQ}{COT}Be = brief\n\n{text}{EOQ}" for text in ("hi", "/hi")]
    request = scripted.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 3, 0.8, 9)
    assert request.max_new_tokens == 7
    assert "temperature: 0.5\n" in done.stdout


def test_settings_are_shown_and_taken_back(ask: Program, scripted: Scripted) -> None:
    lines = ["/condition cot", "/condition", "/condition off", "/system x", "/system off", "/top_k"]
    done = ask(typed=[*lines, "hi"])
    for line in ("condition: cot", "condition: direct", "system: x", "system: ", "top_k: None"):
        assert line in done.stdout.splitlines()
    assert scripted.prompts() == [f"{BOQ}{DIRECT}hi{EOQ}"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/condition foo", "'foo'"),
        ("/temperature warm", "temperature=warm"),
        ("/shots nowhere.jsonl", "nowhere.jsonl is no file"),
        ("/depth H_cycles=0", "H_cycles=0"),
        ("/depth cycles=2", "cycles=2"),
        ("/depth deep", "unknown option 'deep'; this net's depth is set by H_cycles, L_cycles"),
        ("/depth --help", "unknown option"),
        ("/nonsense", "no command is called /nonsense"),
        ("x" * 80, "83 tokens"),
    ],
)
def test_a_mistake_in_a_chat_is_said_and_changes_nothing(
    ask: Program, scripted: Scripted, line: str, told: str
) -> None:
    done = ask(typed=[line, "hi"])
    assert (done.code, done.stderr) == (0, "")
    assert f"error: {told}" in done.stdout or ("error: " in done.stdout and told in done.stdout)
    assert scripted.prompts()[-1] == f"{BOQ}{DIRECT}hi{EOQ}"


def test_depth_can_be_changed_and_taken_back(run: Path, ask: Program) -> None:
    done = ask(typed=["abc", "/depth H_cycles=1 L_cycles=5", "abc", "/depth", "/depth off", "abc"])
    trained, other = engine_answer(run, "abc"), engine_answer(run, "abc", H_cycles=1, L_cycles=5)
    assert trained != other
    shown = [line for line in done.stdout.splitlines() if line in (trained, other)]
    assert shown == [trained, other, trained]
    assert done.stdout.count("depth: H_cycles=1 L_cycles=5\n") == 2


def test_help_names_conditions_and_every_setting(ask: Program) -> None:
    shown = ask(typed=["/help"]).stdout
    for name in (*chat.SETTINGS, "depth", "reset", "quit", *CONDITION_TOKENS):
        assert name in shown
    assert "H_cycles=2 L_cycles=3" in shown


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    ask: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = prompt_format().encode_response("ab")[:2]
    stopped, whole = Scripted(a, KeyboardInterrupt, b), Scripted(a, b)
    streams = iter((stopped, whole))
    monkeypatch.setattr(InferenceEngine, "stream", lambda *given: next(streams)(*given))
    done = ask("history=true", typed=["one", "^C", "two"])
    assert done.code == 0
    assert "a\n(stopped)\n" in done.stdout and "ab\n" in done.stdout
    assert whole.prompts() == [f"{BOQ}{DIRECT}two{EOQ}"]  # what was stopped is no turn


def test_control_characters_do_not_reach_the_terminal(
    ask: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Scripted.saying("red \x1b[31m\x07 é\ttab")
    monkeypatch.setattr(InferenceEngine, "stream", lambda *given: said(*given))
    assert "red \\x1b[31m\\x07 é\ttab\n" in ask(typed=["hi"]).stdout
    assert ask("message=hi").stdout == "red \x1b[31m\x07 é\ttab\n"


@pytest.mark.slow
def test_a_real_process_answers_a_pipe_and_dies_of_ctrl_c_with_130(run: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/chat.py"), f"ckpt_path={run}"]
    done = subprocess.run(command, input=b"abc\n", capture_output=True, check=True, cwd=run.parent)
    assert set(done.stdout.decode()) <= {*LETTERS, "\n"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=run.parent
    )
    time.sleep(12)  # it waits for its prompt by then, on a busy machine too
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in stderr
