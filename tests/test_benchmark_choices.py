"""Multiple choice: prompts, shots, letters, robust rules. Golden cases pin the rest."""

from __future__ import annotations

import pytest
from benchmark_cases import Rows, golden_mirror, judged

from evaluation.benchmarks.arc import ARC
from evaluation.benchmarks.boolq import BoolQ
from evaluation.benchmarks.hellaswag import HellaSwag
from evaluation.benchmarks.mmlu import MMLU
from evaluation.benchmarks.mmlu_pro import MMLUPro, last_letter, stated_letter
from evaluation.benchmarks.multiple_choice import Question, question
from evaluation.benchmarks.protocol import Item, judge_all
from evaluation.benchmarks.winogrande import Winogrande

FOUR = Item("x", "?", "B", ("A", "B", "C", "D"), "s")
ALL = (ARC(num_shots=2), BoolQ(), HellaSwag(), Winogrande(), MMLU())


def test_a_question_is_stripped_and_lettered() -> None:
    asked = Question(" Which? \n", (" one", "two "), 1)
    assert asked.prompt == "Which?\nA. one\nB. two\nAnswer:"
    assert asked.shot == "Which?\nA. one\nB. two\nAnswer: B\n\n"


def test_an_unreadable_letter_is_published_as_a_guess() -> None:
    right, wrong, dotted, unread = judged(ARC(), FOUR, " b\n", "C", "B.", "?")
    assert [each.correct for each in (right, wrong, dotted, unread)] == [1.0, 0.0, 0.25, 0.25]
    assert [each.robust for each in (right, wrong, dotted, unread)] == [1.0, 0.0, 1.0, 0.0]
    assert [each.invalid for each in (right, wrong, dotted, unread)] == [False, False, True, True]


def test_acc_robust_stands_beside_acc() -> None:
    benchmark = ARC(num_shots=0)
    items = [FOUR] * 4
    figures = benchmark.figures(items, judge_all(benchmark, items, ["B", "B.", "?", "A"]))
    assert figures.published == {"n": 4, "acc": 0.375, "invalid": 0.5}
    assert figures.robust == {"acc_robust": 0.5}
    assert set(figures.standard_errors) == {"acc", "invalid", "acc_robust"}


@pytest.mark.parametrize("benchmark", ALL, ids=lambda each: each.name)
def test_chance_is_what_unreadable_answers_earn(benchmark: ARC) -> None:
    items = benchmark.load(golden_mirror()).items
    figures = benchmark.figures(items, judge_all(benchmark, items, ["?"] * len(items)))
    if benchmark.name != "MMLU":
        assert benchmark.chance(items) == pytest.approx(figures.published["acc"])
    assert figures.robust["acc_robust"] == 0.0


def test_a_pool_smaller_than_asked_is_reported() -> None:
    assert ARC(num_shots=25).load(golden_mirror()).notes == ()
    (note,) = ARC(num_shots=27).load(golden_mirror()).notes
    assert "26 shots, 27 were asked for" in note
    notes = MMLU(special_shots={"law_of_toys": 9, "no_such": 1}).load(golden_mirror()).notes
    assert any("law_of_toys has 2 shots, 9" in note for note in notes)
    assert any("no_dev_subject has 0 shots, 5" in note for note in notes)
    assert any("special_shots names no_such" in note for note in notes)


def test_other_shots_change_the_fingerprint() -> None:
    one, two = (ARC(num_shots=count).load(golden_mirror()) for count in (1, 2))
    assert one.fingerprint == ARC(num_shots=1).load(golden_mirror()).fingerprint
    assert one.fingerprint != two.fingerprint


def test_rows_that_cannot_be_asked_are_named() -> None:
    with pytest.raises(ValueError, match="row 7: the right answer is none of the 2"):
        question("?", ["a", "b"], 2, "row 7")
    with pytest.raises(ValueError, match="has 1 options"):
        question("?", ["a"], 0, "row 7")
    with pytest.raises(ValueError, match=r"row 7: its options are no texts: \['a', None\]"):
        question("?", ["a", None], 0, "row 7")  # type: ignore[list-item]
    rows = Rows({"google/boolq/default/validation": [{"question": "q", "passage": "p"}]})
    with pytest.raises(ValueError, match=r"validation row 0 has no column 'answer'; it has quest"):
        BoolQ(num_shots=0).load(rows)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        ARC(num_shots=-1)


@pytest.mark.parametrize(
    ("text", "published", "robust"),
    [
        ("(B)", "B", "B"),
        ("A nice day", "A", None),
        ("A nice day, so the answer is (C).", "C", "C"),
        ("(A) is wrong, so (C)", "C", "C"),
        ("The answer is B. I am sure, as A is not.", "A", "B"),
        ("I think it is B", "B", None),
        ("A is too big.\nAnswer: C", "C", "C"),
        ("A is too big.\n**Answer:** C", "C", "C"),
        ("ANSWER: D, as A is too big", "A", "D"),
        ("\\boxed{D}", "D", "D"),
        ("\\boxed{\\text{(D)}} (A)", "D", "D"),
        ("\\boxed{} (D)", "D", "D"),
        ("B.", "B", "B"),
        ("**C**", "C", "C"),
        ("(b)", None, "B"),
        ("( B )", "B", "B"),
        ("(E)", None, None),
        ("", None, None),
    ],
)
def test_letters_of_mmlu_pro(text: str, published: str | None, robust: str | None) -> None:
    assert last_letter(text, FOUR.letters) == published
    assert stated_letter(text, FOUR.letters) == robust


def test_mmlu_pro_averages_over_categories() -> None:
    items = [FOUR, FOUR, Item("y", "?", "A", ("A", "B"), "t")]
    figures = MMLUPro().figures(items, judge_all(MMLUPro(), items, ["(B)", "(C)", "(A)"]))
    assert (figures.published["n"], figures.published["acc"]) == (2, 0.75)
    assert figures.robust == {"acc_robust": 0.75}
    assert MMLUPro().chance(items) == pytest.approx((0.25 + 0.5) / 2)
