"""The process in which verifiers run: time limit, death, reuse."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from test_evaluation_scoring import HOSTILE

from evaluation import verifier
from evaluation.benchmarks.math import MATH
from evaluation.benchmarks.protocol import Item
from evaluation.verifier import Verifier, VerifierStoppedError
from evaluation.verifier_worker import plainly_spelled

# Stands in for the worker: hangs, dies or fails as it is told.
UNRELIABLE = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    what = json.loads(line)["what"]
    if what == "hang":
        time.sleep(60)
    if what == "die":
        sys.exit(3)
    print(json.dumps({"failed": "MemoryError"} if what == "fail" else {"score": 1.0}), flush=True)
"""


@pytest.fixture
def unreliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    (tmp_path / "unreliable.py").write_text(UNRELIABLE)
    monkeypatch.setattr(verifier, "ROOT", tmp_path)
    monkeypatch.setattr(verifier, "WORKER", "unreliable")
    asked = Verifier(limit_s=0.4)
    yield asked
    asked.close()


@pytest.fixture(scope="module")
def reliable() -> Iterator[Verifier]:
    asked = Verifier(limit_s=2.0)
    asked.ask("integer", gold="1", text="1")  # starting takes longer than an answer
    yield asked
    asked.close()


@pytest.mark.parametrize(
    ("what", "why"), [("hang", "after 0.4 s"), ("die", "by itself"), ("fail", "MemoryError")]
)
def test_what_gives_no_verdict_is_stopped_and_the_next_is_judged(
    unreliable: Verifier, what: str, why: str
) -> None:
    assert unreliable.ask("puzzle", what="judge") == {"score": 1.0}
    with pytest.raises(VerifierStoppedError, match=why):
        unreliable.ask("puzzle", what=what)
    assert unreliable.ask("puzzle", what="judge") == {"score": 1.0}


def test_a_process_killed_between_two_answers_is_replaced(unreliable: Verifier) -> None:
    unreliable.ask("puzzle", what="judge")
    process = unreliable._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert unreliable.ask("puzzle", what="judge") == {"score": 1.0}


def test_a_terminals_ctrl_c_does_not_reach_it(reliable: Verifier) -> None:
    """It goes to a whole process group; the answer under way would be on record as wrong."""
    process = reliable._process
    assert process is not None
    assert os.getpgid(process.pid) != os.getpgrp()


def test_one_process_serves_many_answers(reliable: Verifier) -> None:
    process = reliable._process
    for text in ("7", "\\frac{14}{2}", "x"):
        reliable.ask("math", gold="7", answer=text, boxed=None)
    assert reliable._process is process


def test_a_worker_that_does_not_start_says_what_it_needs(
    unreliable: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "WORKER", "no_such_module")
    with pytest.raises(RuntimeError, match="pip install math-verify==0"):
        unreliable.ask("puzzle", what="judge")


def test_an_answer_that_stops_the_verifier_is_wrong_and_reported(
    unreliable: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.benchmarks.math.shared_verifier", lambda: Dying())
    benchmark, item = MATH(), Item("x", "?", "3")
    verdicts = [benchmark.judge(item, "\\boxed{3}"), benchmark.judge(item, "three")]
    assert [(each.correct, each.robust, each.invalid) for each in verdicts] == [
        (0.0, 0.0, False),
        (0.0, 0.0, True),
    ]
    assert benchmark.figures([item, item], verdicts).notes == ("2 answers: it died",)


class Dying:
    def ask(self, judge: str, **request: str) -> dict[str, object]:
        raise VerifierStoppedError("it died")


@pytest.mark.parametrize(
    ("gold", "answer", "correct", "robust"),
    [
        ("3", "3", True, True),
        ("3", "4", False, False),
        ("3", "3!", True, False),
        ("6", "3!", False, True),
        ("x^2-1", "x^2-1", False, True),
        ("x^2-1", "(x-1)(x+1)", False, True),
        ("\\dfrac{1}{6}", "\\frac{1}{6}", False, True),
        ("\\dfrac{1}{6}", "\\frac{1}{7}", False, False),
        ("\\{-2,2\\}", "\\{2,-2\\}", False, True),
        ("\\left[0,\\infty\\right)", "[0,\\infty)", False, True),
        ("$1<x<2$", "1<x<2", False, True),
        ("(1,2)", "[1,2]", False, False),
        ("\\text{A}", "A", False, True),
        ("\\text{even}", "odd", False, False),
        ("\\$10.25", "10.25", False, True),
        ("1{,}297", "1297", False, True),
        ("1,297", "1297", True, True),
        ("0.5", "\\frac12", False, True),
        ("1024", "2^{10}", False, True),
    ],
)
def test_the_robust_rule_of_mathematics(
    reliable: Verifier, gold: str, answer: str, correct: bool, robust: bool
) -> None:
    reply = reliable.ask("math", gold=gold, answer=f"\\boxed{{{answer}}}", boxed=answer)
    assert (reply["correct"], reply["robust"]) == (correct, robust)
    assert not reply["timed_out"]


def test_plain_spelling() -> None:
    assert plainly_spelled(" $\\left( \\dfrac{1}{2} ,\\, 1,000 \\right)$") == "(\\frac{1}{2},1000)"
    assert plainly_spelled("1,2") == "1,2"
    assert plainly_spelled("1 234 x") == "1234x"
    assert plainly_spelled("1 2") != plainly_spelled("12")


@given(HOSTILE)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_hostile_answers_are_judged_or_stopped(reliable: Verifier, text: str) -> None:
    try:
        reply = reliable.ask("math", gold="3", answer=text, boxed=None)
    except VerifierStoppedError:
        return
    assert isinstance(reply["correct"], bool) and isinstance(reply["robust"], bool)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bomb",
    [
        "$9^{9^{9^{9}}}$",
        "$99999999!$",
        "{" * 20_000,
        "$" + "\\frac{" * 2000 + "$",
        "$" + "(" * 3000 + "1" + ")" * 3000 + "$",
        "$\\sum_{n=1}^{10^{9}} n^{n}$",
        "$\\int_0^1 \\sin(\\cos(\\tan(x^x))) dx$",
        "9" * 200_000,
    ],
)
def test_bombs_are_wrong_within_the_limit(bomb: str) -> None:
    asked = Verifier(limit_s=15.0)
    try:
        reply = asked.ask("math", gold="3", answer=bomb, boxed=None)
        assert not reply["correct"] and not reply["robust"]
    except VerifierStoppedError:
        pass
    assert asked.ask("math", gold="3", answer="3", boxed=None)["correct"]
    asked.close()
