"""Rows as examples in batches: every row is used or counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from tokenizers import normalizers

from data_io import encoding
from data_io.byte_tokenizer import byte_tokenizer
from data_io.encoding import RowEncoder, Tally, first_question
from data_io.examples import ExampleEncoder
from data_io.prompt_format import PromptFormat
from data_io.readers import to_record
from data_io.records import Conversation, Document, Row, Turn
from data_io.source_files import RawRow
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ


def row_encoder(limit: int = 100) -> RowEncoder:
    prompt_format = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, dict(CONDITION_TOKENS))
    read = partial(to_record, reader="rows")
    return RowEncoder(ExampleEncoder(prompt_format), read, limit, Tally())


def raw_rows(count: int) -> Iterator[RawRow]:
    for number in range(count):
        fields = {"instruction": f"q{number}", "response": "a" * (number % 7)}
        yield RawRow(f"row {number}", fields)


@pytest.mark.parametrize(("rows", "chars"), [(1024, 2**22), (3, 2**22), (1024, 8)])
def test_every_row_is_used_or_counted(
    monkeypatch: pytest.MonkeyPatch, rows: int, chars: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_ROWS", rows)
    monkeypatch.setattr(encoding, "BATCH_CHARS", chars)
    encoder = row_encoder(limit=11)
    found = list(encoder.encoded(encoder.records(raw_rows(70))))
    tally = encoder.tally
    assert tally.num_rows == 70 and tally.dropped["empty response"] == 10
    assert len(found) == tally.num_examples == 70 - sum(tally.dropped.values())
    assert all(len(example) < 11 for _, examples in found for example in examples)
    assert tally.longest == 13 and tally.dropped["longer than the context"] > 0
    assert tally.num_tokens == sum(len(each) for _, examples in found for each in examples)
    assert "dropped 10: empty response; the first: row 0" in tally.lines()[0]


def test_an_answer_that_the_tokenizer_takes_away_is_empty() -> None:
    encoder = row_encoder()
    encoder.encoder.prompt_format.tokenizer.normalizer = normalizers.Strip()
    row = RawRow("row 1", {"instruction": "q", "response": "  "})
    assert list(encoder.encoded(encoder.records([row]))) == []
    assert encoder.tally.dropped == {"empty response": 1}


def test_an_unknown_condition_names_its_row() -> None:
    encoder = row_encoder()
    row = RawRow("file, line 3", {"instruction": "q", "response": "a", "condition": "odd"})
    with pytest.raises(ValueError, match="file, line 3: condition='odd'"):
        list(encoder.records([row]))


def test_the_question_is_what_opens_a_record() -> None:
    turns = (Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b"))
    assert first_question(Conversation("direct", "", turns)) == "q"
    assert first_question(Conversation("direct", "s", turns)) == "s\n\nq"
    assert first_question(Row("direct", "q", "a")) == "q" and first_question(Document("t")) == "t"
