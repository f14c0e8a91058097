"""The offline puzzles as a benchmark: held out, levels, verdicts, the curve over difficulty."""

from __future__ import annotations

import json

import pytest
from benchmark_cases import Rows

from evaluation.benchmarks.protocol import Loaded, judge_all
from evaluation.benchmarks.reasoning_gym import (
    HARDER,
    QUESTION_TASKS,
    ReasoningGym,
    accuracy_curve,
)
from evaluation.reasoning_tasks import TASKS, distinct_examples, task_named

NOTHING = Rows({})


def load(**settings: object) -> tuple[ReasoningGym, Loaded]:
    benchmark = ReasoningGym.model_validate(settings)
    return benchmark, benchmark.load(NOTHING)


def test_the_first_level_is_what_training_data_leaves_out() -> None:
    _, loaded = load(n=20, levels=0)
    for name in ("spell_backward", "binary_matrix", "number_sorting"):
        held_out = distinct_examples(task_named(name), 200, seed=0, part="held_out")
        asked = [item.prompt for item in loaded.items if item.category == name]
        assert asked == [example.instruction for example in held_out[:20]]


@pytest.mark.parametrize("name", TASKS)
def test_truths_are_right_and_others_wrong_at_every_level(name: str) -> None:
    benchmark, loaded = load(tasks=[name], n=6, levels=4)
    items = loaded.items
    assert len(items) == 6 * (1 + len(HARDER.get(name, ())[:4]))
    assert len({item.id for item in items}) == len(items)
    right = judge_all(benchmark, items, [item.truth["response"] for item in items])
    assert all(verdict.correct == 1 for verdict in right)
    wrong = judge_all(benchmark, items, ["?"] * len(items))
    assert all(verdict.correct == 0 for verdict in wrong)
    json.dumps([item.truth for item in items])


def test_harder_levels_are_harder_and_held_apart() -> None:
    _, loaded = load(tasks=["spell_backward"], n=10, levels=4)
    by_level = [{len(item.prompt) - 4 for item in loaded.items[at : at + 10]} for at in (0, 10, 40)]
    assert max(by_level[0]) <= 5 and by_level[1] == {6} and by_level[2] == {9}


def test_the_same_questions_every_time() -> None:
    _, loaded = load(n=5)
    assert loaded.fingerprint == load(n=5)[1].fingerprint
    assert loaded.fingerprint != load(n=5, seed=1)[1].fingerprint


def test_the_curve_falls_where_only_easy_ones_are_answered() -> None:
    benchmark, loaded = load(tasks=["spell_backward", "ca"], n=30, levels=4)
    answers = [
        item.truth["response"] if item.truth["difficulty"] <= 5 else "" for item in loaded.items
    ]
    verdicts = judge_all(benchmark, loaded.items, answers)
    curve = accuracy_curve(loaded.items, verdicts)
    assert [point.task for point in curve] == sorted(
        (point.task for point in curve), key=["spell_backward", "ca"].index
    )
    for point in curve:
        assert point.accuracy == (1.0 if point.difficulty <= 5 else 0.0)
    assert sum(point.n for point in curve) == len(loaded.items)
    figures = benchmark.figures(loaded.items, verdicts)
    assert figures.published["n"] == 2
    on_ca = [item.truth["difficulty"] <= 5 for item in loaded.items if item.category == "ca"]
    assert figures.published["acc_level_0"] == pytest.approx((1 + sum(on_ca) / 30) / 2)
    assert figures.published["acc_level_1"] == 0 and "acc_level_1" in figures.standard_errors
    assert figures.published["invalid_spell_backward"] == pytest.approx(120 / 150)


@pytest.mark.parametrize("task", QUESTION_TASKS)
def test_own_questions_are_verified(task: str) -> None:
    benchmark, loaded = load(subset="questions", tasks=[task], n=2, levels=1)
    from reasoning_gym import create_dataset

    answers = []
    for item in loaded.items:
        assert item.prompt.endswith("\\boxed{}.")
        dataset = create_dataset(task, **item.truth["config"])
        answers.append(f"I get \\boxed{{{dataset[item.truth['index']]['answer']}}}")
    verdicts = judge_all(benchmark, loaded.items, answers)
    assert [verdict.correct for verdict in verdicts] == [1.0] * 4
    (nonsense,) = judge_all(benchmark, loaded.items[:1], ["\\boxed{nonsense}"])
    assert nonsense.correct == 0 and nonsense.problem is None


def test_tasks_whose_verifier_runs_what_it_reads_are_not_asked() -> None:
    with pytest.raises(ValueError, match="not asked for countdown; tasks are base_conversion"):
        load(subset="questions", tasks=["countdown"])
    with pytest.raises(ValueError, match="no task is named 'sudko'"):
        load(tasks=["sudko"])
