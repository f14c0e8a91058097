"""DROP's EM and F1 against lm-eval's on generated pairs, and on cases made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from test_evaluation_scoring import HARD, HOSTILE

from evaluation.drop_metric import drop_em_f1, normalized

PAIRS = Path(__file__).parent / "fixtures" / "drop_lm_eval.json"


def test_it_equals_lm_eval_on_200_pairs() -> None:
    pairs = json.loads(PAIRS.read_text())["pairs"]
    assert len(pairs) == 200
    for pair in pairs:
        found = drop_em_f1(pair["answer"], pair["golds"])
        assert found == pytest.approx((pair["em"], pair["f1"]), abs=1e-12), pair


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f1"),
    [
        ("17", [["17"]], 1, 1),
        ("The 17.0 crews", [["17"]], 0, 0.67),
        ("18 crews", [["17 crews"]], 0, 0),  # a shared word without the number earns nothing
        ("Blue Oars", [["the Blue Oars"]], 1, 1),
        ("Greys", [["Greys", "Tern Club"]], 0, 0.5),  # one of two spans
        ("16", [["17"], ["16"]], 1, 1),
        ("", [["85"], [""]], 0, 0),  # an empty accepted answer is passed over
        ("", [], 0, 0),
    ],
)
def test_by_hand(answer: str, golds: list[list[str]], em: float, f1: float) -> None:
    assert drop_em_f1(answer, golds) == (em, f1)


def test_normalizing() -> None:
    assert normalized("The Blue-Oars, 1,250 A.J. 3rd -7") == "blue oars 1250.0 aj 3rd 7.0"


@given(HOSTILE)
@HARD
def test_hostile_answers_score_between_zero_and_one(text: str) -> None:
    em, f1 = drop_em_f1(text, [["17 crews"], ["NaN"], ["\ud800"]])
    assert em in (0.0, 1.0) and 0.0 <= f1 <= 1.0
    if normalized(text):
        assert drop_em_f1(text, [[text]]) == (1.0, 1.0)
