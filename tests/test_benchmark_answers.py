"""Benchmarks with written answers: GSM8k, DROP's shots, AIME's votes, and hostile output to all."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import Any

import pytest
from benchmark_cases import Rows, golden_mirror, judged
from hypothesis import given, settings
from test_evaluation_scoring import HOSTILE

from evaluation.benchmarks import BENCHMARKS, benchmark_named
from evaluation.benchmarks import drop as drop_module
from evaluation.benchmarks.aime import AIMEMajorityVoting, pass_at_k
from evaluation.benchmarks.drop import DROP, FixedShot, accepted_answers, digest_of
from evaluation.benchmarks.gsm8k import GSM8k
from evaluation.benchmarks.protocol import Benchmark, Item, judge_all


def test_gsm8k_published_and_robust() -> None:
    verdicts = judged(GSM8k(), Item("x", "?", 8), "\\boxed{8}", "8.99", "It is 8.", "9")
    assert [each.correct for each in verdicts] == [1, 1, 0, 0]
    assert [each.robust for each in verdicts] == [1, 0, 1, 0]
    assert [each.invalid for each in verdicts] == [False, False, True, False]


TRAIN, VALIDATION = (f"EleutherAI/drop/default/{split}" for split in ("train", "validation"))
PASSAGE = "To start the season, the Lions traveled home."
ASKED = {
    "passage": "P.",
    "question": "Q?",
    "answer": {"number": "1", "spans": [], "date": {"day": "", "month": "", "year": ""}},
    "validated_answers": {"number": [], "spans": [], "date": []},
}


@pytest.mark.parametrize(
    "change",
    [
        {"answer": {}},
        {"answer": {"number": "", "spans": [None], "date": {}}},
        {"answer": {"number": "", "spans": [], "date": {"day": ""}}},
        {"validated_answers": {"number": [], "date": []}},
        {"validated_answers": {"number": None, "date": [], "spans": []}},
    ],
)
def test_a_row_of_drop_that_cannot_be_scored_is_named(change: dict[str, Any]) -> None:
    empty = {"number": [], "date": [], "spans": []}
    row = {"answer": {"number": "3", "spans": [], "date": {}}, "validated_answers": empty}
    assert accepted_answers(row, "row 7") == [["3"]]
    with pytest.raises(ValueError, match="row 7"):
        accepted_answers(row | change, "row 7")


def drop_rows(question: str) -> Rows:
    other = {"passage": PASSAGE, "question": "Another?"}
    shot = {"passage": PASSAGE, "question": question}
    return Rows({VALIDATION: [ASKED], TRAIN: [other, shot, shot]})


def test_drop_shots_are_found_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    written = f"{PASSAGE}\nQ: Why?\nA: 3"
    shot = FixedShot("To start", "Why?", "3", digest_of(PASSAGE), digest_of(written))
    monkeypatch.setattr(drop_module, "SHOTS", (shot,))
    loaded = DROP(num_shots=1).load(drop_rows("Why?"))
    assert loaded.items[0].prompt == f"{written}\n\nP.\nQ: Q?\nA:"
    assert loaded.notes == ()


def test_drop_shots_that_differ_or_lack_are_reported() -> None:
    published = drop_module.SHOTS[0].question
    loaded = DROP(num_shots=2).load(drop_rows(published))
    assert loaded.items[0].prompt.startswith(f"{PASSAGE}\nQ: {published}\nA: 3\n\nP.")
    assert [note.split("?")[1].split(":")[0] for note in loaded.notes] == [
        "' differs from the published one",
        "' differs from the published one",
        "' is not in EleutherAI/drop train",
    ]
    (note,) = DROP().load(golden_mirror()).notes
    assert note.startswith("asked without its 3 published shots") and "train.jsonl" in note


def test_the_digests_of_drop_shots_are_complete() -> None:
    for shot in drop_module.SHOTS:
        assert len(shot.passage_digest) == len(shot.shot_digest) == 16


def pass_at_k_by_counting(n: int, num_correct: int, k: int) -> float:
    chosen = list(combinations(range(n), k))
    return float(Fraction(sum(min(each) < num_correct for each in chosen), len(chosen)))


@pytest.mark.parametrize("num_correct", range(7))
def test_pass_at_k_counts_subsets(num_correct: int) -> None:
    for k in range(1, 7):
        expected = pass_at_k_by_counting(6, num_correct, k)
        assert pass_at_k(6, num_correct, k) == pytest.approx(expected)
    assert pass_at_k(6, num_correct, 7) == 0.0


def test_aime_votes_published_and_robust() -> None:
    benchmark = AIMEMajorityVoting(n=4, pass_k=(1, 2, 8))
    items = [Item(f"0#{sample}", "?", 55, category="0") for sample in range(4)]
    answers = ["\\boxed{55.0}", "So it is 55.", "\\boxed{54}", "\\boxed{55^\\circ}"]
    verdicts = judge_all(benchmark, items, answers)
    assert [each.extracted for each in verdicts] == [None, None, 54, None]
    assert [each.correct for each in verdicts] == [0, 1, 0, 1]
    assert [each.robust for each in verdicts] == [1, 1, 0, 1]
    figures = benchmark.figures(items, verdicts)
    assert figures.published["maj_pass@1"] == 0 and figures.robust["maj_pass@1_robust"] == 1
    assert figures.published["pass@1"] == 0.5 and figures.robust["pass@1_robust"] == 0.75
    assert (figures.published["0_valid"], figures.published["0_cons_count"]) == (1, 1)
    assert figures.notes == ("pass@8 needs 8 samples per problem, there are 4",)


def test_aime_years() -> None:
    assert AIMEMajorityVoting.model_validate({"year": 24}).splits()[0].dataset == "math-ai/aime24"
    with pytest.raises(ValueError, match="year"):
        AIMEMajorityVoting(year="2024")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Gsm8k", "mean GSM8k"), ("hella-swag", "mean HellaSwag"), ("zzz", "there are GSM8k, MATH")],
)
def test_an_unknown_benchmark_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        benchmark_named(name)


def test_more_answers_than_items_are_refused() -> None:
    with pytest.raises(ValueError, match="GSM8k: 2 answers to 1 items"):
        judge_all(GSM8k(), [Item("x", "?", 1)], ["1", "2"])


@lru_cache
def few(name: str) -> tuple[Benchmark, list[Item]]:
    """A benchmark and some of its items."""
    kind = BENCHMARKS[name]
    benchmark = kind.model_validate({"n": 2} if "n" in kind.model_fields else {})
    return benchmark, benchmark.load(golden_mirror()).items[:3]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_hostile_answers_are_judged(name: str) -> None:
    @given(HOSTILE)
    @settings(max_examples=25, deadline=None, derandomize=True)
    def judge(text: str) -> None:
        benchmark, items = few(name)
        verdicts = judge_all(benchmark, items, [text] * len(items))
        assert all(0 <= each.correct <= 1 for each in verdicts)
        figures = benchmark.figures(items, verdicts)
        assert benchmark.headline in figures.published

    judge()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_robust_figures_come_with_a_rule(name: str) -> None:
    benchmark, items = few(name)
    figures = benchmark.figures(items, judge_all(benchmark, items, ["1", "2"]))
    assert bool(figures.robust) == (benchmark.robust_rule is not None)
    assert all(figure.endswith("_robust") for figure in figures.robust)
