"""Rows of CORE as token sequences: shots, rendering and spans by hand."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from asking_cases import prompt_format
from core_cases import COLOURS, ENDINGS, LM, MC, PRONOUNS, SCHEMA, byte_ids, encoded, examples
from tokenizers import Tokenizer

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from evaluation.core.bundle import TaskType, example_of
from evaluation.core.prompts import EncodedRow, RenderedRow, cropped, in_core_order, rendered
from inference.requests import Span


def row_of(
    kind: TaskType, values: dict[str, Any], delimiter: str = " ", shots: str = ""
) -> RenderedRow:
    return RenderedRow(shots, delimiter, example_of(values, kind, "row"), kind)


def test_rows_are_shuffled_then_cut_and_shots_come_from_the_rest() -> None:
    shuffled = examples(MC)
    random.Random(1337).shuffle(shuffled)
    assert in_core_order(examples(MC), None) == shuffled
    rows = in_core_order(examples(MC), 4)
    assert rows == shuffled[:4]
    two_shots = MC.model_copy(update={"num_fewshot": 2})
    for index, row in enumerate(rendered(rows, two_shots)):
        others = [at for at in range(4) if at != index]
        one, other = (rows[at] for at in random.Random(1234 + index).sample(others, 2))
        assert row.example == rows[index]
        assert row.shots == (
            f"{one.contexts[0]}\nA: {one.continuations[one.gold]}\n\n"
            f"{other.contexts[0]}\nA: {other.continuations[other.gold]}\n\n"
        )
    with pytest.raises(ValueError, match="colours has 2 rows, of which a row takes 2 others"):
        list(rendered(rows[:2], two_shots))


def test_shots_of_each_kind_are_written_with_the_right_option() -> None:
    shots = {
        entry.label: next(
            rendered(examples(entry)[:2], entry.model_copy(update={"num_fewshot": 1}))
        )
        for entry in (MC, SCHEMA, LM)
    }
    assert shots["colours"].shots == "Q: blue?\nA: sky\n\n"
    assert shots["pronouns"].shots == "A cup fell; it broke\n\n"
    assert shots["endings"].shots == "sun moon star\n\n"
    assert shots["endings"].before(" one two ") == "sun moon star\n\none two "  # stripped context
    assert shots["colours"].shown == "Q: blue?\nA: sky\n\nQ: red?\nA: {rose | sky | grass}"
    assert shots["pronouns"].shown.endswith("{Ann fed Bo as Ann | Ann fed Bo as Bo} ate")
    assert shots["endings"].shown.endswith("sun moon star\n\n one two  {three}")


def test_multiple_choice_scores_from_the_first_difference() -> None:
    row = encoded(row_of("multiple_choice", COLOURS[2], delimiter="\nA: ", shots="S\n\n"))
    whole = [[1_000, *byte_ids(f"S\n\nQ: green?\nA: {each}")] for each in ("ruby", "rust", "rush")]
    boq = prompt_format().boq_id
    assert [span.token_ids for span in row.spans] == [[boq, *each[1:]] for each in whole]
    # boq, "S\n\n" (3), "Q: green?" (9), "\nA: " (4), "ru": all three options begin with it
    assert [span.start for span in row.spans] == [1 + 3 + 9 + 4 + 2] * 3
    assert [span.num_prefix_tokens for span in row.spans] == [1] * 3
    assert not row.is_moved


def test_schema_scores_the_common_end() -> None:
    row = encoded(row_of("schema", PRONOUNS[2]))
    # "He ran; he hid" and "He sat; he hid" end alike from "; he hid" (8) on
    assert [len(span.token_ids) - span.start for span in row.spans] == [8, 8]
    assert [len(span.token_ids) for span in row.spans] == [15, 15]
    other = encoded(row_of("schema", PRONOUNS[0]))  # "... as Ann ate", "... as Bo ate"
    assert [len(span.token_ids) - span.start for span in other.spans] == [4, 4]


def test_language_modelling_scores_what_follows_the_stripped_context() -> None:
    row = encoded(row_of("language_modeling", ENDINGS[0]))
    (span,) = row.spans
    assert span.token_ids == [prompt_format().boq_id, *byte_ids("one two three")]
    assert byte_ids(" three") == span.token_ids[span.start :]


def test_as_a_prompt_the_continuation_is_the_answer() -> None:
    frame = prompt_format()
    row = encoded(row_of("multiple_choice", COLOURS[2], "\nA: "), "prompt")
    prompt = frame.encode_prompt("direct", "Q: green?\nA:")
    assert [span.token_ids for span in row.spans] == [
        [*prompt, *byte_ids(each)] for each in ("ruby", "rust", "rush")
    ]
    assert [span.num_prefix_tokens for span in row.spans] == [len(prompt)] * 3
    assert [span.start for span in row.spans] == [len(prompt) + 2] * 3
    row = encoded(row_of("schema", PRONOUNS[2]), "prompt")
    first = frame.encode_prompt("direct", "He ran; he")
    # What the prompts have in common at their ends is no span: it is not causal.
    assert (row.spans[0].num_prefix_tokens, row.spans[0].start) == (len(first), len(first))
    (span,) = encoded(row_of("language_modeling", ENDINGS[3]), "prompt").spans
    assert span.token_ids == [*frame.encode_prompt("direct", "up down"), *byte_ids("up")]
    assert span.token_ids[span.start :] == byte_ids("up")


def test_an_option_that_another_begins_with_is_scored_by_its_last_token() -> None:
    values = {"query": "Q", "choices": ["yes", "yes it is"], "gold": 0}
    row = encoded(row_of("multiple_choice", values))
    short, long = row.spans
    assert row.is_moved
    assert short.token_ids[short.start :] == byte_ids("s")
    assert long.token_ids[long.start :] == byte_ids(" it is")


def test_a_token_across_the_border_belongs_to_the_span() -> None:
    state = json.loads(byte_tokenizer().to_str())
    state["model"]["vocab"]["bĠ"] = max(state["model"]["vocab"].values()) + 1
    state["model"]["merges"] = [["b", "Ġ"]]
    merging = Tokenizer.from_str(json.dumps(state))
    frame = PromptFormat(merging, BOQ, EOQ, EOA, dict(CONDITION_TOKENS))
    row = encoded(row_of("language_modeling", {"context": "ab", "continuation": "cd"}), of=frame)
    (span,) = row.spans
    assert row.is_moved
    assert frame.decode(span.token_ids[span.start :]) == "b cd"


def test_rows_survive_packing() -> None:
    for entry in (MC, SCHEMA, LM):
        for kind in ("bos", "prompt"):
            for row in rendered(examples(entry), entry):
                one = encoded(row, kind)
                assert EncodedRow.unpacked(one.packed()) == one


def test_cropping_takes_text_from_the_left_and_leaves_the_frame() -> None:
    text = [*range(10, 20)]
    plain = Span([1, *text], 1, 8)
    assert cropped(plain, 11, 1) == plain
    assert cropped(plain, 6, 1) == Span([1, *text[5:]], 1, 3)
    assert cropped(plain, 4, 1) == Span([1, *text[7:]], 1, 1)  # boq and the span alone
    assert cropped(plain, 3, 1) is None
    prompt = Span([1, 5, *text, 2, 30, 31], 13, 14)  # boq, condition, text, eoq, answer
    assert cropped(prompt, 8, 2) == Span([1, 5, *text[7:], 2, 30, 31], 6, 7)
    assert cropped(prompt, 5, 2) == Span([1, 5, 2, 30, 31], 3, 4)
    assert cropped(prompt, 4, 2) is None
