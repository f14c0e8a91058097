"""Which rows may be sampled: short, long and cut ones, in parts of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenized_cases import Sources

from data_io import row_selection
from data_io.mixing import MixtureRule
from data_io.row_selection import LengthRules, UsableRows, usable_chunks
from data_io.tokenized_format import TokenizedSource

# (instruction, response) lengths
LENGTHS = [(2, 1), (2, 2), (3, 5), (6, 2), (5, 1), (5, 2), (7, 3), (1, 6), (4, 4)]


@pytest.fixture
def source(tmp_path: Path) -> TokenizedSource:
    rows = [([40] * inst, [41] * resp) for inst, resp in LENGTHS]
    return TokenizedSource.open(Sources(tmp_path / "tokenized").add("a.jsonl", rows))


def select(source: TokenizedSource, long_context: str, **lengths: int) -> UsableRows:
    rule = MixtureRule.model_validate({"prefix": "", "long_context": long_context})
    rules = LengthRules(**({"context_size": 6, "min_resp_length": 2} | lengths))
    return UsableRows.of_source(source, rule, rules)


def lengths_of(source: TokenizedSource, rows: UsableRows) -> list[tuple[int, int]]:
    return [
        pair
        for chunk in usable_chunks(source, rows)
        for pair in zip(chunk.inst_len.tolist(), chunk.resp_len.tolist(), strict=True)
    ]


def test_long_rows_are_cut_and_go_when_nothing_is_left(source: TokenizedSource) -> None:
    rows = select(source, "truncate")
    assert lengths_of(source, rows) == [(2, 2), (3, 3), (5, 1), (1, 5), (4, 2)]
    assert rows.num_cut == 4
    assert rows.dropped == {
        "response below min_resp_length=2": 2,  # judged before the cut, which may leave 1
        "instruction of context_size=6 tokens or more": 2,
    }
    assert len(rows) == 5


def test_long_rows_go_where_the_mixture_says_so(source: TokenizedSource) -> None:
    rows = select(source, "drop")
    assert lengths_of(source, rows) == [(2, 2)]
    assert rows.num_cut == 0
    assert rows.dropped["longer than context_size=6"] == 6


def test_parts_of_any_size_give_the_same_rows(
    source: TokenizedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lengths_of(source, select(source, "truncate"))
    for size in (1, 2, 5):
        monkeypatch.setattr(row_selection, "MAX_CHUNK_ROWS", size)
        rows = select(source, "truncate")
        assert lengths_of(source, rows) == expected
        firsts = [chunk.first for chunk in usable_chunks(source, rows)]
        assert firsts == sorted(firsts)


def test_a_part_holds_no_more_tokens_than_memory_should() -> None:
    assert LengthRules(2**24, 2).chunk_rows == 1
    assert LengthRules(2**30, 2).chunk_rows == 1
    assert LengthRules(4097, 2).chunk_rows == 4095


def test_rows_left_out_later_count_among_the_usable_ones(source: TokenizedSource) -> None:
    rows = select(source, "truncate")
    rows.leave_out(np.array([True, False, False, True, False]), "why not")
    assert lengths_of(source, rows) == [(3, 3), (5, 1), (4, 2)]
    assert rows.dropped["why not"] == 2
    everything = select(source, "truncate", context_size=99, min_resp_length=1)
    assert everything.usable is None
    everything.leave_out(np.arange(9) == 8, "why not")
    assert lengths_of(source, everything) == LENGTHS[:8]
