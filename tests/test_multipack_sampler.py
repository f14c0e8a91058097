"""Packing: the published groups, a literal LPT for everything else, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipack_sampler import EpochCount, MultipackSampler, RankRow, count_epoch

Rows = list[list[int]]


def literal_rows(lengths: list[int], first: int, rows: int, width: int) -> Rows | None:
    """LPT on `lengths`, whose indices count from `first`; None where a row would overflow."""
    heap = [[0, row] for row in range(rows)]
    filled: Rows = [[] for _ in range(rows)]
    for offset in np.argsort(lengths, kind="stable")[::-1]:
        root = [heap[0][0] + lengths[offset], heap[0][1]]
        if root[0] > width:
            return None
        filled[root[1]].append(first + int(offset))
        slot = 0
        while 2 * slot + 1 < rows:
            child = 2 * slot + 1
            if child + 1 < rows and heap[child + 1][0] < heap[child][0]:
                child += 1
            if heap[child][0] >= root[0]:
                break
            heap[slot] = heap[child]
            slot = child
        heap[slot] = root
    return filled


def literal_epoch(lengths: list[int], rows: int, width: int, *, drop_last: bool) -> list[Rows]:
    """Every global batch, all rows of it, by a full LPT at each step of the bisection."""
    batches, start = [], 0
    while start < len(lengths):
        stop, total = start, 0
        while stop < len(lengths) and total < rows * width:
            total += lengths[stop]
            stop += 1
        low, high = 1, stop - start + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = literal_rows(lengths[start : start + middle], start, rows, width)
            low, high = (middle, high) if fits else (low, middle)
        batch = literal_rows(lengths[start : start + low], start, rows, width)
        assert batch is not None
        start += low
        if low < rows or (drop_last and start == len(lengths)):
            break
        batches.append(batch)
    return batches


def packed(
    lengths: list[int], rows: int, width: int, *, drop_last: bool, rank: int, cursor: int = 0
) -> list[RankRow]:
    sampler = MultipackSampler(
        lengths,
        batch_max_length=width,
        num_replicas=rows,
        rank=rank,
        drop_last_batch=drop_last,
        cursor=cursor,
    )
    return list(sampler)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(lengths, rows, width); few distinct lengths make ties, long ones make rows hard to fill."""
    width = draw(st.integers(1, 60))
    longest = draw(st.integers(1, width))
    lengths = draw(st.lists(st.integers(1, longest), max_size=80))
    return lengths, draw(st.integers(1, 9)), width


def test_golden_groups_of_every_rank_and_drop_rule(golden_sampler: Path) -> None:
    case = json.loads(golden_sampler.read_text())
    with np.load(golden_sampler.with_suffix(".npz")) as arrays:
        lengths = arrays["lengths"]
        for result in case["results"]:
            drop, rank = (int(part[4:]) for part in result["key"].split("."))
            flat, offsets = (arrays[f"{result['key']}.{name}"] for name in ("flat", "offsets"))
            expected = [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)]
            rows, width = case["num_replicas"], case["batch_max_length"]
            found = packed(lengths, rows, width, drop_last=bool(drop), rank=rank)
            assert [row.indices.tolist() for row in found] == expected
            count = count_epoch(
                lengths, batch_max_length=width, num_replicas=rows, drop_last_batch=bool(drop)
            )
            assert count.num_batches == result["num_batches"]
            assert count.filled_tokens == result["eff_used"]


@given(packings(), st.booleans())
def test_groups_are_those_of_a_literal_lpt(
    packing: tuple[list[int], int, int], drop_last: bool
) -> None:
    lengths, rows, width = packing
    expected = literal_epoch(lengths, rows, width, drop_last=drop_last)
    for rank in range(rows):
        found = packed(lengths, rows, width, drop_last=drop_last, rank=rank)
        assert [row.indices.tolist() for row in found] == [batch[rank] for batch in expected]
    counted = count_epoch(
        lengths, batch_max_length=width, num_replicas=rows, drop_last_batch=drop_last
    )
    filled = [[sum(lengths[i] for i in row) for row in batch] for batch in expected]
    assert counted == EpochCount(
        num_batches=len(expected),
        max_row_examples=max((len(row) for batch in expected for row in batch), default=0),
        final_cursor=sum(len(row) for batch in expected for row in batch),
        filled_tokens=sum(map(sum, filled)),
    )


@pytest.mark.parametrize("longest", [3, 300, 70_000, 9_000_000])
def test_groups_hold_for_every_number_of_radix_passes(longest: int) -> None:
    lengths = np.random.default_rng(1).integers(1, longest + 1, 300).tolist()
    expected = literal_epoch(lengths, 3, 4 * longest, drop_last=False)
    found = packed(lengths, 3, 4 * longest, drop_last=False, rank=1)
    assert [row.indices.tolist() for row in found] == [batch[1] for batch in expected]


@given(packings())
def test_ranks_share_out_what_the_cursor_moves_over(packing: tuple[list[int], int, int]) -> None:
    lengths, rows, width = packing
    ranks = [packed(lengths, rows, width, drop_last=False, rank=rank) for rank in range(rows)]
    cursor = 0
    for batch in zip(*ranks, strict=True):
        assert {row.start_cursor for row in batch} == {cursor}
        (stop,) = {row.next_cursor for row in batch}
        indices = np.concatenate([row.indices for row in batch])
        assert sorted(indices.tolist()) == list(range(cursor, stop))
        assert all(sum(lengths[i] for i in row.indices) <= width for row in batch)
        cursor = stop


@given(packings(), st.booleans())
def test_starting_at_a_cursor_gives_the_rest_of_the_epoch(
    packing: tuple[list[int], int, int], drop_last: bool
) -> None:
    lengths, rows, width = packing
    whole = packed(lengths, rows, width, drop_last=drop_last, rank=rows - 1)
    for done, row in enumerate(whole):
        rest = packed(
            lengths, rows, width, drop_last=drop_last, rank=rows - 1, cursor=row.start_cursor
        )
        assert [r.indices.tolist() for r in rest] == [r.indices.tolist() for r in whole[done:]]
        counted = count_epoch(
            lengths,
            batch_max_length=width,
            num_replicas=rows,
            drop_last_batch=drop_last,
            cursor=row.start_cursor,
        )
        assert counted.num_batches == len(whole) - done
        assert counted.final_cursor == whole[-1].next_cursor


def test_lengths_may_have_any_integer_type_and_be_read_only() -> None:
    expected = packed([3, 1, 2, 2], 2, 4, drop_last=False, rank=0)
    for dtype in (np.uint8, np.int16, np.uint64, np.int64, np.dtype(">i4")):
        lengths = np.array([3, 1, 2, 2], dtype)
        lengths.flags.writeable = False
        (row,) = MultipackSampler(
            lengths, batch_max_length=4, num_replicas=2, rank=0, drop_last_batch=False
        )
        assert row.indices.tolist() == expected[0].indices.tolist()


def test_an_empty_epoch_has_no_batches() -> None:
    assert packed([], 2, 4, drop_last=False, rank=0) == []


@pytest.mark.parametrize(
    ("lengths", "changes", "message"),
    [
        ([3, 9, 2], {}, r"example 1 has length 9 .* batch_max_length=8 .* make rows at least that"),
        ([3, 0, 2], {}, r"example 1 has length 0, .* at least 1 token .* remove it"),
        ([3, -4], {}, "example 1 has length -4"),
        ([2**40], {}, f"example 0 has length {2**40}"),
        ([1.5], {}, "list of integers, .* got float64"),
        ([[1, 2]], {}, r"got int64 of shape \(1, 2\)"),
        ([1], {"cursor": 2}, "cursor=2 is outside this epoch of 1 examples"),
        ([1], {"cursor": -1}, "cursor=-1 is outside"),
        ([1], {"rank": 2}, "rank=2 is not one of num_replicas=2 ranks; use 0 to 1"),
        ([1], {"num_replicas": 0, "rank": 0}, "num_replicas=0"),
        ([1], {"batch_max_length": 0}, "batch_max_length=0 must lie between 1"),
        ([1], {"batch_max_length": 2**31}, "batch_max_length=2147483648 must lie"),
    ],
)
def test_bad_input_is_refused_with_value_rule_and_way_out(
    lengths: list[int], changes: dict[str, int], message: str
) -> None:
    settings = {"batch_max_length": 8, "num_replicas": 2, "rank": 0, **changes}
    with pytest.raises(ValueError, match=message):
        MultipackSampler(lengths, drop_last_batch=True, **settings)


def test_the_count_refuses_what_the_sampler_refuses() -> None:
    with pytest.raises(ValueError, match="example 0 has length 9"):
        count_epoch([9], batch_max_length=8, num_replicas=1, drop_last_batch=True)
    with pytest.raises(ValueError, match="num_replicas=0 must be at least 1"):
        count_epoch([1], batch_max_length=8, num_replicas=0, drop_last_batch=True)
