"""Exact duplicates: rows equal in every token and in what is scored, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenized_cases import Sources

from data_io.deduplicate import DuplicateFinder
from data_io.mixing import EVERY_ROW_ONCE
from data_io.row_selection import LengthRules, UsableRows, usable_chunks
from data_io.tokenized_format import TokenizedSource


def repeated(scratch: Path, folders: Sequence[Path], context_size: int = 50) -> list[bool]:
    with DuplicateFinder(scratch) as finder:
        for folder in folders:
            source = TokenizedSource.open(folder)
            rows = UsableRows.of_source(source, EVERY_ROW_ONCE, LengthRules(context_size, 1))
            for chunk in usable_chunks(source, rows):
                finder.add(source, chunk)
        return finder.repeated().tolist()


def test_of_equal_rows_the_first_stays(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    one = sources.add("a", [([1], [2, 3]), ([1, 2], [3]), ([1], [2, 3]), ([9], [9])])
    other = sources.add("b", [([1], [2, 3]), ([4], [5]), ([9], [9])])
    found = repeated(tmp_path / "scratch", [one, other])
    assert found == [False, False, True, False, True, False, True]
    assert not (tmp_path / "scratch").exists()


def test_the_stored_type_makes_no_difference(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    folders = [sources.add(name, [([300], [2, 3])]) for name in ("a", "b")]
    tokens = np.load(folders[1] / "tokens.npy").astype(np.uint16)
    np.save(folders[1] / "tokens.npy", tokens)
    assert repeated(tmp_path / "scratch", folders) == [False, True]


def test_rows_that_differ_beyond_the_cut_are_not_equal(tmp_path: Path) -> None:
    folder = Sources(tmp_path / "tokenized").add("a", [([1], [2, 3, 4]), ([1], [2, 3, 5])])
    assert repeated(tmp_path / "scratch", [folder], context_size=3) == [False, False]


def test_what_is_scored_belongs_to_a_row(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    folders = [
        sources.add("a", [([1], [2, 3])]),
        sources.add("b", [([1], [2, 3])], scored=[1, 1, 1]),  # the same as no mask
        sources.add("c", [([1], [2, 3])], scored=[1, 0, 1]),
        sources.add("d", [([1], [2, 3])], scored=[0, 0, 1]),  # instructions are not scored anyway
    ]
    assert repeated(tmp_path / "scratch", folders) == [False, True, False, True]


def test_many_rows_are_found_as_by_a_set(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [(draw.integers(0, 3, 3).tolist(), draw.integers(0, 4, 3).tolist()) for _ in range(2000)]
    folder = Sources(tmp_path / "tokenized").add("a", rows)
    seen: set[str] = set()
    expected = []
    for row in map(str, rows):
        expected.append(row in seen)
        seen.add(row)
    assert repeated(tmp_path / "scratch", [folder]) == expected
