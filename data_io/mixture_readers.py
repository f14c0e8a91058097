"""Rows of the data sets that a chat mixture is made of, beyond the layouts of `data_io.readers`.

mmlu_letters   question, choices, answer: asked as the chat evaluation asks, answered by letter
gsm8k_calls    question, answer: `<<48/2=24>>` becomes the call of a tool and its result
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from data_io.examples import CALL
from data_io.readers import to_record
from data_io.records import BadRowError, Conversation, Record, Row

LETTERS = "ABCD"
CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")

Fields = Mapping[str, Any]


def read_mmlu(fields: Fields, condition: str) -> Row:
    """As evaluation/chat_tasks/choices.py asks. The auxiliary part wraps its rows in `train`."""
    if isinstance(fields.get("train"), Mapping):
        fields = fields["train"]
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) for c in choices):
        raise BadRowError("choices are no list of texts")
    if len(choices) != len(LETTERS):
        raise BadRowError("not four choices", f"{len(choices)}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRowError("answer is no number of a choice", f"{answer!r:.40}")
    question = _text(fields, "question")
    lines = [f"- {choice}={letter}" for letter, choice in zip(LETTERS, choices, strict=True)]
    asked = "Respond only with the letter of the correct answer."
    prompt = "\n".join((f"Multiple Choice question: {question}", *lines, "", asked))
    row = {"instruction": prompt, "response": LETTERS[answer], "condition": condition}
    checked = to_record(row, "rows")  # whole characters
    assert isinstance(checked, Row)
    return checked


def read_gsm8k(fields: Fields, condition: str) -> Conversation:
    """Each calculation in the answer is a call that a tool answers; the text goes on after it."""
    question, answer = _text(fields, "question"), _text(fields, "answer")
    texts = CALCULATION.split(answer)  # text, expression, result, text, ...
    turns = []
    for text, expression, result in zip(texts[::3], texts[1::3], texts[2::3], strict=False):
        turns.append({"role": "assistant", "content": f"{text}<{CALL}>{expression}</{CALL}>"})
        turns.append({"role": "tool", "content": result})
    if not texts[-1] and len(texts) > 1:
        raise BadRowError("answer ends with a calculation")
    turns.append({"role": "assistant", "content": texts[-1]})
    messages = [{"role": "user", "content": question}, *turns]
    checked = to_record({"messages": messages, "condition": condition}, "messages")
    assert isinstance(checked, Conversation)
    return checked


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadRowError("missing field" if value is None else "field is no text", name)
    return value


MIXTURE_READERS: Mapping[str, Callable[[Fields, str], Record]] = MappingProxyType(
    {"mmlu_letters": read_mmlu, "gsm8k_calls": read_gsm8k}
)
