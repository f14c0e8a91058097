"""What the programs share: text as it comes, prompts, rows of a file, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from asking_cases import prompt_format
from hypothesis import given
from hypothesis import strategies as st
from net_cases import NETS, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, EOA, EOQ, SPECIAL_TOKENS
from inference.asking import (
    BROKEN,
    AskOptions,
    Row,
    Surroundings,
    TextDecoder,
    pick_condition,
    read_rows,
    shots_text,
    spelled,
    step_line,
    was_cut,
    weights_fingerprint,
)
from inference.requests import Answer, Token

BYTES = prompt_format()


def word_tokenizer() -> PromptFormat:
    """Words that carry the space before them, which is lost at the beginning of a text."""
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, "▁the", "▁cat", "s"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PromptFormat(tokenizer, BOQ, EOQ, EOA, {})


def pieces_of(form: PromptFormat, ids: list[int]) -> list[str]:
    decoder = TextDecoder(form)
    return [*(decoder.add(token_id) for token_id in ids), decoder.rest()]


def test_characters_of_several_tokens_come_out_whole() -> None:
    pieces = pieces_of(BYTES, BYTES.encode_response("aé🙂!")[:-1])
    assert pieces == ["a", "", "é", "", "", "", "🙂", "!", ""]


@given(st.text())
def test_pieces_make_the_whole_text(text: str) -> None:
    pieces = pieces_of(BYTES, BYTES.encode_response(text)[:-1])
    assert "".join(pieces) == text
    assert BROKEN in text or not any(BROKEN in piece for piece in pieces)


@given(st.lists(st.integers(0, BYTES.vocab_size - 1)))
def test_pieces_of_any_ids_make_what_they_decode_to(ids: list[int]) -> None:
    assert "".join(pieces_of(BYTES, ids)) == BYTES.decode(ids)


def test_a_space_that_is_lost_at_the_beginning_is_not_lost_between_pieces() -> None:
    form = word_tokenizer()
    vocabulary = form.tokenizer.get_vocab()
    the, cat, s = (vocabulary[token] for token in ("▁the", "▁cat", "s"))
    assert pieces_of(form, [the, cat, s, the]) == ["the", " cat", "s", " the", ""]
    special = vocabulary[BOQ]
    for ids in ([the, special, cat], [special, the, special, special, cat, the]):
        assert "".join(pieces_of(form, ids)) == form.decode(ids)


def test_a_broken_rest_is_given_at_the_end() -> None:
    ids = BYTES.encode_response("a🙂")[:3]
    assert pieces_of(BYTES, ids) == ["a", "", "", BROKEN]


def test_the_usual_condition_is_taken_only_where_the_model_has_it() -> None:
    assert pick_condition(BYTES, None) == "direct"
    assert pick_condition(BYTES, "synth,cot") == "synth,cot"
    with pytest.raises(ValueError, match="'foo'"):
        pick_condition(BYTES, "foo")
    other = PromptFormat(BYTES.tokenizer, BOQ, EOQ, EOA, {"cot": BYTES.conditions["cot"]})
    with pytest.raises(ValueError, match=r"no condition 'direct'.*\['cot'\]"):
        pick_condition(other, None)


def test_rows_have_a_prompt_and_perhaps_more(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"instruction": "a", "response": "b", "condition": "cot", "task": 1}\n\n'
        '{"prompt": "c", "response": null}\n{"instruction": ""}'
    )
    assert list(read_rows(path)) == [Row("a", "cot", "b"), Row("c"), Row("")]
    assert shots_text(path, 1) == "a\nb\n\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "line 1"),
        (b"[]", r"\[\] is no object"),
        (b"null", "None is no object"),
        (b'{"question": "a"}', r"this one has \['question'\]"),
        (b'{"instruction": "a", "prompt": "a"}', "either an instruction or a prompt"),
        (b'{"instruction": 3}', "instruction=3 is no text"),
        (b'{"instruction": null}', "instruction=None is no text"),
        (b'{"prompt": "a", "response": 4}', "response=4 is no text"),
        (b'{"prompt": "a", "condition": ["cot"]}', "condition="),
        (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{told}"):
        list(read_rows(path))


def test_options_refuse_what_cannot_be_sampled() -> None:
    assert AskOptions(ckpt_path=Path("run"), temperature=0.5, seed=3).sampling.seed == 3
    for settings in ({"temperature": float("nan")}, {"temperature": -1}, {"top_p": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AskOptions.model_validate({"ckpt_path": "run", **settings})


def test_fingerprints_tell_weights_apart() -> None:
    torch.manual_seed(0)
    model = build(NETS["hrm"])
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert weights_fingerprint(model) != before


def test_steps_are_shown_with_their_tokens_spelled() -> None:
    letter, space = BYTES.encode_response("a ")[:2]
    token = Token(0, letter, 0.75, ((letter, 0.75), (space, 0.2), (BYTES.eoa_id, 0.05)))
    line = step_line(BYTES, 3, token)
    assert line.startswith("   3  'a' 0.750") and "| 'a' 0.750  ' ' 0.200  " in line
    assert line.endswith(f"'{EOA}' 0.050")
    assert spelled(BYTES, 500) == "500"
    assert spelled(BYTES, BYTES.encode_response("é")[0]) == "'Ã'"  # the first byte of two


def test_what_cut_an_answer_off_is_named() -> None:
    assert was_cut(Answer(0, (1, 2), "stop"), 2) is None
    assert was_cut(Answer(0, (1, 2), "length"), 2) == "cut off after 2 tokens: max_output_tokens=2"
    assert was_cut(Answer(0, (1, 2), "length"), 3) == "cut off after 2 tokens: the context is full"


def test_a_question_may_stand_in_the_template_of_trm() -> None:
    turns = (("user", "a"), ("assistant", "b"))
    asked = Surroundings("direct", "Be brief.", "", turns, template="trm").encode(BYTES, "c")
    text = "[SYSTEM]\nBe brief.\n[USER]\na\n[ASSISTANT]\nb\n[USER]\nc\n[ASSISTANT]\n"
    assert asked == BYTES.encode_prompt("direct", text)
    bare = Surroundings("direct", template="trm").encode(BYTES, "c")
    assert bare == BYTES.encode_prompt("direct", "[USER]\nc\n[ASSISTANT]\n")
