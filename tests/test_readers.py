"""Rows of foreign data sets, in their own layouts, as records; what cannot be used has a reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.readers import AUTO, READERS, choose_reader, require_reader, to_record
from data_io.records import BadRowError, Conversation, Document, Row, Turn
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS

FORMAT = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)
QUESTION, ANSWER = Turn("user", "Why?", is_scored=False), Turn("assistant", "Because.")

FOREIGN: dict[str, tuple[dict[str, Any], Any]] = {
    "rows": (
        {"condition": "synth,cot", "instruction": "Why?", "response": "Because.", "foo": 1},
        Row("synth,cot", "Why?", "Because."),
    ),
    "messages": (
        {
            "prompt_id": "a1",
            "messages": [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}],
                },
                {"role": "assistant", "content": "Because."},
            ],
        },
        Conversation("direct", "Be short.", (QUESTION, ANSWER)),
    ),
    "sharegpt": (
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be short.", "weight": None},
                {"from": "human", "value": "Why?", "weight": 0.0},
                {"from": "gpt", "value": "Hm.", "weight": 0},
                {"from": "tool", "value": "42"},
                {"from": "gpt", "value": "Because.", "weight": 1.0},
            ],
        },
        Conversation(
            "direct",
            "Be short.",
            (
                QUESTION,
                Turn("assistant", "Hm.", is_scored=False),
                Turn("tool", "42", is_scored=False),
                ANSWER,
            ),
        ),
    ),
    "openorca": (
        {"id": "1", "system_prompt": "Be short.", "question": "Why?", "response": "Because."},
        Conversation("direct", "Be short.", (QUESTION, ANSWER)),
    ),
    "prompt_response": (
        {"prompt": "Why?", "response": "Because."},
        Row("direct", "Why?", "Because."),
    ),
    "text": (
        {"text": "A page.", "id": "<urn>", "dump": "CC", "url": "u", "token_count": 3},
        Document("A page."),
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("is_named", [True, False])
def test_a_foreign_row_becomes_its_record(reader: str, is_named: bool) -> None:
    fields, expected = FOREIGN[reader]
    assert choose_reader(fields) == reader
    assert to_record(fields, reader if is_named else AUTO) == expected


def test_the_condition_asked_for_is_of_rows_without_one() -> None:
    for reader in ("messages", "sharegpt", "openorca", "prompt_response"):
        record = to_record(FOREIGN[reader][0], condition="cot")
        assert isinstance(record, (Row, Conversation))
        assert record.condition == "cot"
    row = {"instruction": "Why?", "response": "Because.", "condition": None}
    assert to_record(row, condition="cot") == Row("cot", "Why?", "Because.")
    own = row | {"condition": "synth"}
    assert to_record(own, condition="cot") == Row("synth", "Why?", "Because.")


def test_fields_that_are_null_do_not_choose_a_reader() -> None:
    nothing = {"messages": None, "text": None, "prompt": None}
    assert choose_reader(nothing | FOREIGN["sharegpt"][0]) == "sharegpt"


def test_fields_of_two_layouts_are_refused_with_the_way_out() -> None:
    both = FOREIGN["messages"][0] | {"text": "the same, written out"}
    with pytest.raises(
        ValueError, match="read as messages and as text; say which: reader="
    ) as told:
        to_record(both)
    assert not isinstance(told.value, BadRowError)  # it concerns every row
    assert isinstance(to_record(both, "messages"), Conversation)


def test_an_unknown_reader_is_refused() -> None:
    with pytest.raises(ValueError, match="reader='alpaca' is none of auto, rows, messages"):
        to_record({}, "alpaca")
    with pytest.raises(ValueError, match="none of auto"):
        require_reader("")


def test_a_system_column_is_kept() -> None:
    fields = {"system": "Be short.", "conversations": FOREIGN["sharegpt"][0]["conversations"][1:]}
    assert to_record(fields) == FOREIGN["sharegpt"][1]
    asked = {"system": "Be short.", "prompt": "Why?", "response": "Because."}
    assert to_record(asked) == Conversation("direct", "Be short.", (QUESTION, ANSWER))
    clash = {"system": "Be long.", **FOREIGN["sharegpt"][0]}
    assert reason_of(clash) == "two system prompts"


def test_turns_after_the_last_answer_are_left_out() -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    record = to_record({"messages": [*turns, {"role": "user", "content": "And?"}]})
    assert record == Conversation("direct", "", (QUESTION, ANSWER))


@pytest.mark.parametrize("name", ["human", "user"])
@pytest.mark.parametrize("other", ["gpt", "assistant", "chatgpt", "bing", "bard"])
def test_synonyms_of_roles_are_known(name: str, other: str) -> None:
    turns = [{"from": name, "value": "Why?"}, {"from": other, "value": "Because."}]
    assert to_record({"conversations": turns}) == Conversation("direct", "", (QUESTION, ANSWER))


def reason_of(fields: dict[str, Any], reader: str = AUTO) -> str:
    with pytest.raises(BadRowError) as told:
        to_record(fields, reader)
    return told.value.reason


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "missing field"),
        ({"instruction": "a"}, "missing field"),
        ({"question": "a", "answer": "b"}, "missing field"),
        ({"instruction": "a", "response": None}, "missing field"),
        ({"instruction": "a", "response": ""}, "empty response"),
        ({"instruction": 1, "response": "b"}, "field is no text"),
        ({"instruction": "a", "response": ["b"]}, "field is no text"),
        ({"instruction": "a", "response": "b", "condition": 1}, "field is no text"),
        ({"instruction": "a", "response": "\ud83d"}, "half of a surrogate pair"),
        ({"text": "a \udc00"}, "half of a surrogate pair"),
        ({"text": ""}, "empty text"),
        ({"text": 1}, "field is no text"),
        ({"messages": "hello"}, "turns are no list"),
        ({"messages": ["hello"]}, "turn is no object"),
        ({"messages": []}, "no assistant turn"),
        (chat(("user", "a")), "no assistant turn"),
        (chat(("system", "a")), "no assistant turn"),
        (chat(("assistant", "a")), "roles out of order"),
        (chat(("tool", "a"), ("assistant", "b")), "roles out of order"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "roles out of order"),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), "roles out of order"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "roles out of order"),
        (
            chat(("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d")),
            "roles out of order",
        ),
        (chat(("user", "a"), ("assistant", "")), "empty response"),
        (chat(("user", "a"), ("assistant", None)), "missing field"),
        (chat(("narrator", "a"), ("assistant", "b")), "unknown role"),
        (chat((["user"], "a")), "unknown role"),
        (chat((None, "a")), "unknown role"),
        (chat(("user", [{"type": "image_url"}]), ("assistant", "b")), "part is no text"),
        (chat(("user", ["a"]), ("assistant", "b")), "part is no text"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "tool calls as objects",
        ),
        ({"conversations": [{"from": "human"}]}, "missing field"),
        ({"conversations": {"from": ["human"], "value": ["a"]}}, "turns are no list"),
    ],
)
def test_a_row_that_cannot_be_used_has_a_reason(fields: dict[str, Any], reason: str) -> None:
    assert reason_of(fields) == reason


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1", float("nan")])
def test_weights_that_cannot_be_kept_are_a_reason(weight: Any) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": weight}]
    assert reason_of({"conversations": turns}) == "weight is neither 0 nor 1"


def test_a_conversation_of_weight_zero_teaches_nothing() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    assert reason_of({"conversations": turns}) == "no scored turn"


def test_a_named_reader_says_which_field_is_missing() -> None:
    with pytest.raises(BadRowError, match=r"missing field: openorca needs question, response"):
        to_record({"prompt": "a"}, "openorca")


spelled = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=6), max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(system=spelled, question=spelled, answer=spelled.filter(bool))
def test_special_tokens_spelled_in_any_layout_stay_text(
    system: str, question: str, answer: str
) -> None:
    turns = (("system", system), ("user", question), ("assistant", answer))
    records = [
        to_record({"instruction": question, "response": answer}),
        to_record(chat(*turns)),
        to_record({"conversations": [{"from": role, "value": text} for role, text in turns]}),
        to_record({"system_prompt": system, "question": question, "response": answer}),
        to_record({"prompt": question, "response": answer}),
        to_record({"text": answer}),
    ]
    for record in records:
        if isinstance(record, Document):
            texts = [record.text]
        elif isinstance(record, Row):
            texts = [record.instruction, record.response]
        else:
            texts = [record.system, *(turn.text for turn in record.turns)]
        assert texts == [system, question, answer][-len(texts) :]
        for ids in FORMAT.encode_texts(texts):
            assert all(token_id >= len(SPECIAL_TOKENS) for token_id in ids)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "type", "text"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from([name for reader in READERS.values() for name in reader.required]),
        anything,
    ),
    reader=st.sampled_from([AUTO, *READERS]),
)
def test_whatever_the_fields_hold_is_a_record_or_a_reason(
    fields: dict[str, Any], reader: str
) -> None:
    try:
        to_record(fields, reader)
    except ValueError as error:
        assert isinstance(error, BadRowError) or "say which" in str(error)
