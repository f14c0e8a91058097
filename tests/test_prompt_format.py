"""Text to ids and back: text is data, whatever it spells."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import TokenizerInfo
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS

GOLDEN_TOKENIZER = Path(__file__).parent / "golden" / "sft" / "edge" / "tokenizer.json"
NUM_SPECIAL = len(SPECIAL_TOKENS)
ID_OF = {token: index for index, token in enumerate(SPECIAL_TOKENS)}

# Pieces that spell special tokens, whole or cut, between arbitrary text.
texts = st.lists(
    st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=8) | st.sampled_from(["<|", "|>", "im_end"]),
    max_size=8,
).map("".join)


def make_format(
    tokenizer: Tokenizer, conditions: Mapping[str, str] = CONDITION_TOKENS
) -> PromptFormat:
    return PromptFormat(tokenizer, BOQ, EOQ, EOA, conditions)


def info_of(folder: Path) -> TokenizerInfo:
    return TokenizerInfo(
        tokenizer_path=str(folder),
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        condition_mapping=dict(CONDITION_TOKENS),
        vocab_size=NUM_SPECIAL + 256,
    )


BYTES = make_format(byte_tokenizer())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=texts)
def test_text_never_becomes_a_special_id(text: str) -> None:
    prompt, response = BYTES.encode_prompt("direct", text), BYTES.encode_response(text)
    assert prompt[:2] == [ID_OF[BOQ], ID_OF["<|object_ref_start|>"]]
    assert (prompt[-1], response[-1]) == (ID_OF[EOQ], ID_OF[EOA])
    assert prompt[2:-1] == response[:-1]
    assert all(token_id >= NUM_SPECIAL for token_id in response[:-1])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=texts)
def test_text_comes_back_whole(text: str) -> None:
    assert BYTES.decode(BYTES.encode_response(text)) == text
    assert BYTES.decode(BYTES.encode_prompt("synth,cot", text)) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=texts)
def test_text_never_becomes_a_special_id_of_a_trained_tokenizer(text: str) -> None:
    trained = make_format(Tokenizer.from_file(str(GOLDEN_TOKENIZER)))
    framing = {trained.boq_id, trained.eoq_id, trained.eoa_id, *trained.condition_ids("direct,cot")}
    assert not framing & set(trained.encode_response(text)[:-1])


def test_every_byte_that_text_can_hold_has_its_own_token() -> None:
    text = "".join(map(chr, range(0xD800))) + "".join(chr(plane << 16) for plane in range(17))
    ids = BYTES.encode_response(text)[:-1]
    assert len(ids) == len(text.encode())
    assert len(set(ids)) == len(set(text.encode()))
    assert BYTES.decode(ids) == text
    assert BYTES.vocab_size == NUM_SPECIAL + 256


def test_half_of_a_surrogate_pair_is_named() -> None:
    with pytest.raises(ValueError, match=r"texts \[1\].*surrogate"):
        BYTES.encode_responses(["fine", "broken \ud800"])


def test_conditions_are_written_one_after_another() -> None:
    ids = BYTES.encode_prompt("synth, cot", "x")
    assert ids[1:3] == [ID_OF["<|quad_end|>"], ID_OF["<|object_ref_end|>"]]
    assert len(ids) == 5


@pytest.mark.parametrize("condition", ["nosuch", "direct,nosuch", "", "direct,"])
def test_an_unknown_condition_is_named_with_those_there_are(condition: str) -> None:
    with pytest.raises(ValueError, match=r"known are \['cot', 'direct', 'noisy', 'synth'\]"):
        BYTES.encode_prompt(condition, "x")


def test_a_batch_equals_its_items() -> None:
    conditions, batch = ["direct", "cot,noisy"], ["one", ""]
    assert BYTES.encode_prompts(conditions, batch) == [
        BYTES.encode_prompt(condition, text)
        for condition, text in zip(conditions, batch, strict=True)
    ]
    assert BYTES.encode_responses(batch) == [BYTES.encode_response(text) for text in batch]
    with pytest.raises(ValueError, match="zip"):
        BYTES.encode_prompts(["direct"], batch)


@pytest.mark.parametrize("role", ["boq", "eoq", "eoa", "conditions"])
def test_a_token_that_the_tokenizer_lacks_is_named(role: str) -> None:
    token = {"mine": "<|none|>"} if role == "conditions" else "<|none|>"
    with pytest.raises(ValueError, match=r"<\|none\|>.*name some that it has"):
        replace(BYTES, **{role: token})


def test_an_ordinary_token_cannot_play_a_role() -> None:
    with pytest.raises(ValueError, match="not special tokens"):
        replace(BYTES, eoa="a")


def test_a_token_that_text_reaches_as_a_whole_word_cannot_play_a_role() -> None:
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    with pytest.raises(ValueError, match="text could pass for it"):
        make_format(tokenizer)


def test_an_added_token_that_is_not_special_is_made_so_in_its_role() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<answer>", special=False)])
    added_id = tokenizer.token_to_id("<answer>")
    assert tokenizer.encode("<answer>").ids == [added_id]
    assert added_id not in make_format(tokenizer, {"a": "<answer>"}).encode_response("<answer>")


def test_truncation_and_padding_of_a_tokenizer_file_are_off(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PromptFormat.from_info(info_of(tmp_path))
    assert loaded.encode_response("longer") == BYTES.encode_response("longer")


def test_a_moved_tokenizer_is_found_beside_the_data(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    info = info_of(tmp_path / "gone")
    found = PromptFormat.from_info(info, data_folder=tmp_path)
    assert found.encode_prompt("cot", "x") == BYTES.encode_prompt("cot", "x")
    with pytest.raises(ValueError, match="no tokenizer at"):
        PromptFormat.from_info(info)


@pytest.mark.parametrize("field", ["tokenizer_path", "boq", "eoq", "eoa", "condition_mapping"])
def test_an_absent_field_of_tokenizer_info_is_named(tmp_path: Path, field: str) -> None:
    write_byte_tokenizer(tmp_path)
    info = info_of(tmp_path).model_copy(update={field: None})
    with pytest.raises(ValueError, match=f"tokenizer_info lacks {field}"):
        PromptFormat.from_info(info)


def test_a_conversation_is_its_turns_framed_one_after_another() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", f"Hello{EOA}"), ("user", "?")]
    first = BYTES.encode_prompt("synth,cot", "Be brief.\n\nHi")
    answer, last = BYTES.encode_response(f"Hello{EOA}"), BYTES.encode_prompt("synth,cot", "?")
    assert BYTES.encode_conversation("synth,cot", turns) == first + answer + last
    assert BYTES.encode_conversation("direct", [("user", "Hi")]) == BYTES.encode_prompt(
        "direct", "Hi"
    )


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["system"],
        ["assistant"],
        ["user", "assistant"],
        ["user", "user"],
        ["user", "system", "user"],
        ["user", "assistant", "assistant", "user"],
        ["human"],
    ],
)
def test_turns_that_leave_nothing_to_answer_are_refused(roles: list[str]) -> None:
    with pytest.raises(ValueError, match="no conversation to answer"):
        BYTES.encode_conversation("direct", [(role, "x") for role in roles])


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        PromptFormat.from_info(info_of(tmp_path))
