"""Examples of records: framed as a model is asked later, scored where it is to learn."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_io.byte_tokenizer import byte_tokenizer
from data_io.examples import Example, ExampleEncoder, Turns
from data_io.prompt_format import PromptFormat
from data_io.records import BadRowError, Conversation, Document, Row, Turn
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS

TALK = Conversation(
    "synth,cot",
    "Be brief.",
    (
        Turn("user", "one?"),
        Turn("assistant", "1"),
        Turn("user", "two?"),
        Turn("assistant", "2", is_scored=False),
        Turn("user", "three?"),
        Turn("assistant", "3"),
    ),
)
SPOKEN = [
    ("system", "Be brief."),
    *(("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")),
    ("user", "three?"),
]
CALLS = Conversation(
    "direct",
    "",
    (
        Turn("user", "2*3+1?"),
        Turn("assistant", "2*3 = <tool_call>2*3</tool_call>"),
        Turn("tool", "6", is_scored=False),
        Turn("assistant", "6, so 7"),
    ),
)


@pytest.fixture(scope="module")
def prompt_format() -> PromptFormat:
    return PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, dict(CONDITION_TOKENS))


def examples(
    prompt_format: PromptFormat, record: Row | Conversation | Document, turns: Turns = "each"
) -> list[Example]:
    (found,) = ExampleEncoder(prompt_format, turns).encode([record])
    return found


def spelled(prompt_format: PromptFormat, ids: list[int]) -> str:
    return prompt_format.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_row_is_asked_and_answered_as_the_format_says(prompt_format: PromptFormat) -> None:
    row = Row("synth,cot", "why? <|im_end|>", "so <|box_end|>")
    assert examples(prompt_format, row) == [
        Example(
            prompt_format.encode_prompt("synth,cot", row.instruction),
            prompt_format.encode_response(row.response),
        )
    ]


def test_each_answer_reads_what_the_chat_would_send(prompt_format: PromptFormat) -> None:
    first, last = examples(prompt_format, TALK)
    assert first.inst_ids == prompt_format.encode_conversation("synth,cot", SPOKEN[:2])
    assert first.resp_ids == prompt_format.encode_response("1")
    assert last.inst_ids == prompt_format.encode_conversation("synth,cot", SPOKEN)
    assert last.resp_ids == prompt_format.encode_response("3")
    assert first.scored is None and last.scored is None


def test_the_last_answer_alone(prompt_format: PromptFormat) -> None:
    assert examples(prompt_format, TALK, "last") == examples(prompt_format, TALK)[1:]


def test_all_answers_in_one_score_only_what_is_learned(prompt_format: PromptFormat) -> None:
    (example,) = examples(prompt_format, TALK, "all")
    assert example.inst_ids == prompt_format.encode_conversation("synth,cot", SPOKEN[:2])
    whole = prompt_format.encode_conversation("synth,cot", SPOKEN)
    assert example.inst_ids + example.resp_ids == whole + prompt_format.encode_response("3")
    assert example.scored is not None and len(example.scored) == len(example.resp_ids)
    learned = [
        token for token, is_in in zip(example.resp_ids, example.scored, strict=True) if is_in
    ]
    assert learned == prompt_format.encode_response("1") + prompt_format.encode_response("3")


def test_what_follows_the_last_learned_answer_is_left_out(prompt_format: PromptFormat) -> None:
    talk = Conversation("direct", "", (*TALK.turns[:2], *TALK.turns[2:4]))
    (example,) = examples(prompt_format, talk, "all")
    assert example.resp_ids == prompt_format.encode_response("1") and example.scored is None


def test_a_conversation_without_learned_answers_makes_no_example(
    prompt_format: PromptFormat,
) -> None:
    turns = (Turn("user", "?"), Turn("assistant", "!", is_scored=False))
    for which in ("each", "last", "all"):
        assert examples(prompt_format, Conversation("direct", "", turns), which) == []


def test_what_a_tool_gave_back_is_read_within_the_answer(prompt_format: PromptFormat) -> None:
    (example,) = examples(prompt_format, CALLS)
    assert example.inst_ids == prompt_format.encode_prompt("direct", "2*3+1?")
    text = "2*3 = <tool_call>2*3</tool_call><tool_response>6</tool_response>6, so 7<|box_end|>"
    assert spelled(prompt_format, example.resp_ids) == text
    assert example.scored is not None
    passed = [i for i, is_in in zip(example.resp_ids, example.scored, strict=True) if not is_in]
    assert spelled(prompt_format, passed) == "<tool_response>6</tool_response>"
    marks = [SPECIAL_TOKENS.index(each) for each in ("<tool_call>", "</tool_response>")]
    assert all(example.resp_ids.count(mark) == 1 for mark in marks)  # tokens, no characters


def test_results_of_tools_are_learned_on_request(prompt_format: PromptFormat) -> None:
    ((example,),) = ExampleEncoder(prompt_format, scores_tools=True).encode([CALLS])
    assert example.scored is None


def test_a_call_is_one_only_where_a_tool_answers(prompt_format: PromptFormat) -> None:
    text = "<tool_call>2*3</tool_call>"
    talk = Conversation("direct", "", (Turn("user", "?"), Turn("assistant", text)))
    for record in (Row("direct", "?", text), talk):
        (example,) = examples(prompt_format, record)
        assert example.resp_ids == prompt_format.encode_response(text)
        assert SPECIAL_TOKENS.index("<tool_call>") not in example.resp_ids


def test_calls_are_spelled_out_where_the_tokenizer_has_no_tokens_for_them(
    prompt_format: PromptFormat,
) -> None:
    framing = [BOQ, EOQ, EOA, *CONDITION_TOKENS.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: at for at, token in enumerate((*framing, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in framing])
    plain = PromptFormat(tokenizer, BOQ, EOQ, EOA, dict(CONDITION_TOKENS))
    (example,) = examples(plain, CALLS)
    text = "2*3 = <tool_call>2*3</tool_call><tool_response>6</tool_response>6, so 7"
    assert example.resp_ids == plain.encode_response(text)
    assert example.scored is not None
    assert example.scored.count(0) == len("<tool_response>6</tool_response>")


def test_a_wrapped_result_is_wrapped_once(prompt_format: PromptFormat) -> None:
    turns = list(CALLS.turns)
    turns[2] = Turn("tool", "<tool_response>6</tool_response>\n", is_scored=False)
    wrapped = Conversation("direct", "", tuple(turns))
    assert examples(prompt_format, wrapped) == examples(prompt_format, CALLS)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70_000])
def test_a_document_is_windows_behind_a_prefix_of_one_token(
    prompt_format: PromptFormat, length: int
) -> None:
    text = "".join(chr(ord("a") + at % 26) for at in range(length))
    (found,) = ExampleEncoder(prompt_format, document_window=16).encode([Document(text)])
    assert all(each.inst_ids == [prompt_format.boq_id] for each in found)
    assert all(len(each.resp_ids) == 16 for each in found[:-1])
    ids = [token for each in found for token in each.resp_ids]
    assert ids == prompt_format.encode_response(text)
    assert examples(prompt_format, Document(text)) == [Example([prompt_format.boq_id], ids)]


def test_records_of_all_kinds_share_a_batch(prompt_format: PromptFormat) -> None:
    records = [Row("direct", "a", "b"), TALK, Document("text"), CALLS]
    together = ExampleEncoder(prompt_format).encode(records)
    assert together == [examples(prompt_format, record) for record in records]


@pytest.mark.parametrize("roles", ["assistant", "user user assistant", "user tool assistant"])
def test_turns_out_of_order_are_refused(prompt_format: PromptFormat, roles: str) -> None:
    turns = tuple(Turn(role, "text") for role in roles.split())  # type: ignore[arg-type]
    with pytest.raises(BadRowError, match="turns out of order"):
        examples(prompt_format, Conversation("direct", "", turns))


def test_an_unknown_condition_is_refused(prompt_format: PromptFormat) -> None:
    with pytest.raises(ValueError, match="unknown names"):
        examples(prompt_format, Row("direkt", "a", "b"))
