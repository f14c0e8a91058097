"""Compact questions and answers, scored by the verifiers of reasoning_gym."""

import json
import sys
from pathlib import Path
from subprocess import run

import pytest

from evaluation.procedural_tasks import Part
from evaluation.reasoning_tasks import (
    DEFAULT_TASKS,
    TASKS,
    distinct_examples,
    score,
    scored_row,
    task_named,
)

ROOT = Path(__file__).parent.parent


def rows_of(name: str, count: int = 40, seed: int = 0, part: Part = "held_out") -> list[dict]:
    """Rows as they come back from a file."""
    task = task_named(name)
    examples = distinct_examples(task, count, seed=seed, part=part)
    return [json.loads(json.dumps(scored_row(task, example))) for example in examples]


@pytest.mark.parametrize("name", TASKS)
def test_the_verifier_scores_the_true_answer_as_right(name: str) -> None:
    for row in rows_of(name, 200):
        assert score(row, row["response"]) == 1.0
        assert score(row, f" {row['response']}\n") == 1.0


@pytest.mark.parametrize("name", TASKS)
def test_the_verifier_scores_other_answers_as_wrong(name: str) -> None:
    rows = rows_of(name)
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        if other["response"] != row["response"]:
            assert score(row, other["response"]) < 1.0
        for malformed in ("", "?", "[1", row["response"] + row["response"]):
            assert score(row, malformed) < 1.0


@pytest.mark.parametrize("name", TASKS)
def test_seed_and_part_decide_the_examples(name: str) -> None:
    assert rows_of(name) == rows_of(name)
    assert rows_of(name) != rows_of(name, seed=1)
    assert rows_of(name) != rows_of(name, part="train")
    instructions = [row["instruction"] for row in rows_of(name)]
    assert len(set(instructions)) == len(instructions)


@pytest.mark.parametrize("name", TASKS)
def test_questions_and_answers_are_short_ascii(name: str) -> None:
    for row in rows_of(name, 200):
        assert row["response"]
        assert (row["instruction"] + row["response"]).isascii()
        assert len(row["instruction"] + row["response"]) <= 64


def test_excluded_questions_are_not_drawn_again() -> None:
    task = task_named("number_sorting")
    first = {each.instruction for each in distinct_examples(task, 300, seed=0, part="train")}
    second = distinct_examples(task, 300, seed=0, part="train", excluded=first)
    assert not first & {example.instruction for example in second}


def test_asking_for_more_than_a_task_has_is_an_error() -> None:
    task = task_named("spell_backward")
    with pytest.raises(ValueError, match=r"and then none in 2000 draws; ask for at most 16\d\d\d "):
        distinct_examples(task, 20_000, seed=0, part="train")


def test_digits_off_by_one_are_not_forgiven() -> None:
    for row in rows_of("number_sorting"):
        digits = [int(digit) for digit in row["response"].split()]
        nudged = sorted([*digits[1:], digits[0] + (1 if digits[0] < 9 else -1)])
        if row["entry"]["metadata"]["direction"] == "descending":
            nudged.reverse()
        assert score(row, " ".join(map(str, nudged))) == 0.0


@pytest.mark.parametrize("name", ["binary_matrix", "number_sorting"])
def test_no_text_reaches_the_eval_of_a_verifier(name: str, tmp_path: Path) -> None:
    row = rows_of(name, 1)[0]
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    assert score(row, code) == 0.0
    forged = {**row, "entry": {**row["entry"], "answer": code}}
    assert score(forged, row["response"]) == 1.0
    with pytest.raises(ValueError, match="cannot have the response"):
        score({**row, "response": code}, row["response"])
    assert not (tmp_path / "ran").exists()


def test_an_unknown_task_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'nosuch'; there are spell_backward, "):
        task_named("nosuch")
    assert set(DEFAULT_TASKS) <= set(TASKS)


def test_the_module_imports_without_reasoning_gym() -> None:
    code = "import sys, evaluation.reasoning_tasks; sys.exit('reasoning_gym' in sys.modules)"
    assert run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
