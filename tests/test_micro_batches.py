"""Rows split into micro-batches: nothing lost, nothing twice, as many on every rank."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_io.row_planning import RowPacking
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from dataset_new import PrefixLMDataset
from models.batch import IGNORE_LABEL
from multipack_sampler import MultipackSampler


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80),
    num_ranks=st.integers(1, 3),
    width=st.integers(20, 70),
)
def test_every_example_of_a_row_is_in_one_micro_row(
    lengths: list[int], num_ranks: int, width: int
) -> None:
    micro_width = 20
    by_rank = []
    for rank in range(num_ranks):
        sampler = MultipackSampler(
            lengths,
            batch_max_length=width,
            num_replicas=num_ranks,
            rank=rank,
            drop_last_batch=False,
        )
        whole, split = list(sampler), list(sampler.in_micro_rows(micro_width))
        assert [row.next_cursor for row in whole] == [part.next_cursor for part in split]
        for row, part in zip(whole, split, strict=True):
            together = np.concatenate(part.rows)
            assert sorted(together) == sorted(row.indices)
            loads = [sum(lengths[i] for i in micro) for micro in part.rows]
            assert max(loads) <= micro_width
            used = [load for load in loads if load]
            # first-fit: no example of a later row would have fitted into an earlier one whole
            assert all(a + b > micro_width for a, b in itertools.pairwise(used))
        by_rank.append([len(part.rows) for part in split])
    assert all(counts == by_rank[0] for counts in by_rank), "as many on every rank"


def test_a_width_that_holds_the_row_changes_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    sampler = MultipackSampler(
        lengths, batch_max_length=64, num_replicas=2, rank=1, drop_last_batch=True
    )
    for row, part in zip(sampler, sampler.in_micro_rows(64), strict=True):
        assert len(part.rows) == 1
        np.testing.assert_array_equal(row.indices, part.rows[0])


def test_an_example_longer_than_a_micro_batch_is_named() -> None:
    sampler = MultipackSampler(
        [3, 9, 4], batch_max_length=16, num_replicas=1, rank=0, drop_last_batch=False
    )
    with pytest.raises(ValueError, match="example 1 takes 9 tokens, more than micro_batch_size=8"):
        next(sampler.in_micro_rows(8))


def test_micro_batches_hold_the_same_labels_as_the_whole_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lens = rng.integers(1, 8, (2, 60))
    with SampledWriter(tmp_path / "data", TokenizerInfo(vocab_size=100), max_seq_len=16) as writer:
        tokens = rng.integers(1, 100, lens.sum())
        offset = writer.add_tokens(tokens)
        starts = offset + np.concatenate(([0], lens.T.ravel().cumsum()[:-1])).reshape(-1, 2).T
        writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))
    data = SampledData.open(tmp_path / "data")
    whole = RowPacking(64, 2, drop_last_batch=False, target_only=True)
    split = RowPacking(64, 2, drop_last_batch=False, target_only=True, micro_batch_size=20)
    for rank in range(2):
        rows = list(PrefixLMDataset(data, whole, num_slots=64, epoch=0, rank=rank))
        parts = list(PrefixLMDataset(data, split, num_slots=64, epoch=0, rank=rank))
        assert all(len(part.tokens) == 20 for part in parts)
        for row in rows:
            own, parts = parts[: parts[0].num_micro], parts[parts[0].num_micro :]
            assert [part.micro_index for part in own] == list(range(len(own)))
            assert {part.next_cursor for part in own} == {row.next_cursor}
            assert sum(part.num_scored for part in own) == row.num_scored
            assert {part.global_num_scored for part in own} == {row.global_num_scored}
            labels = np.concatenate([part.labels.numpy() for part in own])
            found = np.sort(labels[labels != IGNORE_LABEL])
            wanted = np.sort(row.labels.numpy()[row.labels.numpy() != IGNORE_LABEL])
            np.testing.assert_array_equal(found, wanted)
        assert not parts
