"""Rows of MMLU and GSM8K as a chat mixture has them."""

from __future__ import annotations

from typing import Any

import pytest
from mixture_cases import choice_row, gsm8k_row

from data_io.mixture_readers import read_gsm8k, read_mmlu
from data_io.records import BadRowError, Row, Turn
from evaluation.chat_tasks.choices import ChatMMLU


@pytest.mark.parametrize("wrapped", [False, True])
def test_choices_are_asked_as_the_evaluation_asks(wrapped: bool) -> None:
    row = choice_row(7)
    item = ChatMMLU().item_of(row, "1", "row 1")
    made = read_mmlu({"train": row} if wrapped else row, "direct")
    assert made == Row("direct", item.prompt, str(item.truth)) and made.response == "B"


def test_calculations_become_calls_and_results() -> None:
    made = read_gsm8k(gsm8k_row(4), "cot")
    assert made.condition == "cot" and made.system == ""
    assert made.turns == (
        Turn("user", "Twice 4, and one?", is_scored=False),
        Turn("assistant", "It is 2*4 = <tool_call>2*4</tool_call>"),
        Turn("tool", "8", is_scored=False),
        Turn("assistant", "8 apples.\nThen 8+1=<tool_call>8+1</tool_call>"),
        Turn("tool", "9", is_scored=False),
        Turn("assistant", "9.\n#### 9"),
    )


def test_an_answer_without_calculations_stays_text() -> None:
    made = read_gsm8k({"question": "?", "answer": "a << b\n#### 3"}, "direct")
    question = Turn("user", "?", is_scored=False)
    assert made.turns == (question, Turn("assistant", "a << b\n#### 3"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"choices": "abcd", "answer": 1, "question": "?"}, "choices are no list of texts"),
        ({"choices": ["a", "b"], "answer": 1, "question": "?"}, "not four choices"),
        ({"choices": list("abcd"), "answer": 4, "question": "?"}, "answer is no number"),
        ({"choices": list("abcd"), "answer": "B", "question": "?"}, "answer is no number"),
        ({"choices": list("abcd"), "answer": 1}, "missing field"),
        ({"choices": list("abcd"), "answer": 1, "question": "\ud800"}, "half of a surrogate"),
    ],
)
def test_rows_that_are_no_question_are_counted(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read_mmlu(fields, "direct")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "?"}, "missing field"),
        ({"question": 1, "answer": "1"}, "field is no text"),
        ({"question": "?", "answer": "it is <<1+1=2>>"}, "ends with a calculation"),
        ({"question": "?", "answer": ""}, "empty response"),
    ],
)
def test_rows_that_are_no_answer_are_counted(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read_gsm8k(fields, "direct")
