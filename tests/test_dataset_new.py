"""Rows of tokens: the published batches, the same built one example at a time, and the plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_io.row_planning import RowPacking, plan_epochs
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from dataset_new import PrefixLMDataset
from models.batch import IGNORE_LABEL, PackedBatch, PackedLayout

T, REPLICAS = 40, 3


def write_data(
    folder: Path, *, examples: int = 60, epochs: int = 2, with_scored: bool = False, seed: int = 0
) -> SampledData:
    """Random examples whose instruction and response lie apart in tokens.npy."""
    draw = np.random.default_rng(seed)
    lens = draw.integers(1, 12, (2, examples))
    scored = draw.integers(0, 2, 300).astype(np.uint8) if with_scored else None
    info = TokenizerInfo(vocab_size=700)
    with SampledWriter(folder, info, max_seq_len=24, scored=with_scored) as writer:
        writer.add_tokens(draw.integers(0, 700, 300), scored)
        for _ in range(epochs):
            starts = draw.integers(0, 288, (2, examples))
            writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))
            lens = draw.permuted(lens, axis=1)
    return SampledData.open(folder)


def packing(*, target_only: bool = True, drop_last: bool = True) -> RowPacking:
    return RowPacking(T, REPLICAS, drop_last_batch=drop_last, target_only=target_only)


def batches_of(
    data: SampledData, rows: RowPacking, *, rank: int = 0, epoch: int = 0, cursor: int = 0
) -> list[PackedBatch]:
    dataset = PrefixLMDataset(data, rows, num_slots=64, epoch=epoch, cursor=cursor, rank=rank)
    return list(dataset)


def assert_same_batch(found: PackedBatch, expected: PackedBatch) -> None:
    for name in ("tokens", "labels", "positions", "indices"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    for name in PackedLayout.__dataclass_fields__:
        found_part, expected_part = getattr(found.layout, name), getattr(expected.layout, name)
        torch.testing.assert_close(found_part, expected_part, rtol=0, atol=0)
    for name in ("num_scored", "global_num_scored", "global_num_tokens", "next_cursor"):
        assert getattr(found, name) == getattr(expected, name)


def one_by_one(data: SampledData, epoch: int, indices: list[int], target_only: bool) -> list[list]:
    """Inputs, labels and positions of a row without its padding, example after example."""
    index, tokens, scored = data.epoch(epoch), data.tokens(), data.scored()
    inputs, labels, positions = [], [], []
    for i in indices:
        inst = slice(index.inst_start[i], index.inst_start[i] + index.inst_len[i])
        resp = slice(index.resp_start[i], index.resp_start[i] + index.resp_len[i])
        question, answer = tokens[inst].tolist(), tokens[resp].tolist()
        keeps = [1] * len(answer) if scored is None else scored[resp].tolist()
        inputs += question + answer[:-1]
        labels += [IGNORE_LABEL] * (len(question) - 1) if target_only else question[1:]
        labels += [a if keep else IGNORE_LABEL for a, keep in zip(answer, keeps, strict=True)]
        positions += range(len(question) + len(answer) - 1)
    return [inputs, labels, positions]


def padded(values: list[int], filler: int) -> list[int]:
    return values + [filler] * (T - len(values))


def test_golden_batches_of_every_rank_and_epoch(golden_dataset_batches: Path) -> None:
    case = json.loads((golden_dataset_batches / "case.json").read_text())
    data = SampledData.open(golden_dataset_batches / case["dataset"])
    streams = {}
    for target_only in (True, False):
        rows = RowPacking(
            batch_max_length=case["batch_max_length"],
            num_replicas=case["num_replicas"],
            drop_last_batch=case["drop_last_batch"],
            target_only=target_only,
        )
        num_slots = rows.batch_max_length  # enough for any row
        for rank in range(case["num_replicas"]):
            for epoch in range(case["epochs"]):
                dataset = PrefixLMDataset(data, rows, num_slots=num_slots, epoch=epoch, rank=rank)
                streams[f"to{int(target_only)}.rank{rank}.epoch{epoch}"] = list(dataset)
    with np.load(golden_dataset_batches / "batches.npz") as arrays:
        for expected in case["batches"]:
            if "num_batches" in expected:
                assert len(streams[expected["key"]]) == expected["num_batches"]
                continue
            stream, _, number = expected["key"].rpartition(".batch")
            published = {
                name: arrays[f"{expected['key']}.{name}"]
                for name in ("inputs", "labels", "position_ids", *LAYOUT_NAMES)
            }
            compare_with_published(
                streams[stream][int(number)], published, scalars=expected["scalars"]
            )


LAYOUT_NAMES = ("prefix_lens", "causal_lens", "cu_seqlens")


def compare_with_published(
    batch: PackedBatch, published: dict[str, NDArray[np.int32]], *, scalars: dict[str, int]
) -> None:
    """Their layout has as many slots as tokens, zeros behind the used ones."""
    layout = batch.layout
    assert batch.tokens.tolist() == published["inputs"].tolist()
    assert batch.labels.tolist() == published["labels"].tolist()
    assert batch.positions.tolist() == published["position_ids"].tolist()
    assert {
        "total_seqlen": int(layout.num_tokens),
        "numseqs": int(layout.num_seqs),
        "max_seqlen_prefix": int(layout.max_prefix_len),
        "max_seqlen_causal": int(layout.max_causal_len),
        "max_seqlen_all": int(layout.max_seq_len),
    } == scalars
    for name in LAYOUT_NAMES:
        used = int(layout.num_seqs) + (name == "cu_seqlens")
        assert getattr(layout, name)[:used].tolist() == published[name][:used].tolist()
        assert not published[name][used:].any()


@settings(max_examples=15)
@given(seed=st.integers(0, 99), with_scored=st.booleans(), target_only=st.booleans())
def test_rows_are_those_built_one_example_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, seed: int, with_scored: bool, target_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows") / "data"
    data = write_data(folder, with_scored=with_scored, seed=seed, examples=40)
    rows = packing(target_only=target_only, drop_last=False)
    for batch in batches_of(data, rows, epoch=1, rank=seed % REPLICAS):
        indices = [i for i in batch.indices.tolist() if i >= 0]
        inputs, labels, positions = one_by_one(data, 1, indices, target_only)
        assert batch.tokens.tolist() == padded(inputs, 0)
        assert batch.labels.tolist() == padded(labels, IGNORE_LABEL)
        assert batch.positions.tolist() == padded(positions, 0)
        assert batch.num_scored == sum(label != IGNORE_LABEL for label in labels)
        lens = data.epoch(1).inst_len[indices], data.epoch(1).resp_len[indices] - 1
        expected = PackedLayout.from_lengths(*map(torch.from_numpy, lens), num_slots=64)
        for name in PackedLayout.__dataclass_fields__:
            torch.testing.assert_close(getattr(batch.layout, name), getattr(expected, name))


@pytest.mark.parametrize("with_scored", [False, True])
@pytest.mark.parametrize("target_only", [False, True])
def test_scored_labels_and_tokens_of_all_ranks_add_up(
    tmp_path: Path, target_only: bool, with_scored: bool
) -> None:
    data = write_data(tmp_path / "data", with_scored=with_scored)
    ranks = [
        batches_of(data, packing(target_only=target_only), rank=rank) for rank in range(REPLICAS)
    ]
    for batch in zip(*ranks, strict=True):
        total = sum(int((row.labels != IGNORE_LABEL).sum()) for row in batch)
        assert {row.global_num_scored for row in batch} == {total}
        assert sum(row.num_scored for row in batch) == total
        tokens = sum(int(row.layout.num_tokens) for row in batch)
        assert {row.global_num_tokens for row in batch} == {tokens}
        assert len({row.next_cursor for row in batch}) == 1


def test_starting_at_a_batch_s_cursor_gives_what_follows_it(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    whole = batches_of(data, packing(), rank=1)
    assert len(whole) > 3
    for done, batch in enumerate(whole, start=1):
        rest = batches_of(data, packing(), rank=1, cursor=batch.next_cursor)
        for found, expected in zip(rest, whole[done:], strict=True):
            assert_same_batch(found, expected)


def test_batches_do_not_share_memory(tmp_path: Path) -> None:
    first, second = batches_of(write_data(tmp_path / "data"), packing())[:2]
    kept = first.tokens.clone()
    second.tokens.fill_(0)
    assert torch.equal(first.tokens, kept)


def test_the_plan_counts_what_the_dataset_yields(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    rows = packing()
    plan = plan_epochs(data, rows, 2)
    streams = [
        [batches_of(data, rows, rank=rank, epoch=epoch) for rank in range(REPLICAS)]
        for epoch in range(2)
    ]
    batches = [batch for epoch in streams for rank in epoch for batch in rank]
    assert plan.steps == tuple(len(epoch[0]) for epoch in streams)
    assert plan.num_slots == 64
    filled = sum(int(batch.layout.num_tokens) for batch in batches)
    assert plan.padding_share == pytest.approx(1 - filled / (len(batches) * T))
    rest = plan_epochs(data, rows, 2, epoch=1, cursor=streams[1][0][0].next_cursor)
    assert rest.steps == (plan.steps[1] - 1,)
    assert plan_epochs(data, rows, 2, epoch=1, cursor=streams[1][0][-1].next_cursor).steps == (0,)


def test_slots_hold_the_fullest_row_of_any_rank(tmp_path: Path) -> None:
    with SampledWriter(tmp_path / "d", TokenizerInfo(vocab_size=9), max_seq_len=9) as writer:
        writer.add_tokens(np.arange(9))
        ones = np.ones(400, np.int64)
        writer.add_epoch(EpochIndex(ones, ones, ones, ones))
    data = SampledData.open(tmp_path / "d")
    rows = RowPacking(70, 2, drop_last_batch=True, target_only=True)
    plan = plan_epochs(data, rows, 1)
    assert plan.num_slots == 128
    assert plan.mean_keys == 1
    with pytest.raises(ValueError, match="a row holds 70 examples, but num_slots=64; use what pla"):
        list(PrefixLMDataset(data, rows, num_slots=64, epoch=0))


def test_mean_keys_counts_what_each_token_attends_to(tmp_path: Path) -> None:
    with SampledWriter(tmp_path / "d", TokenizerInfo(vocab_size=9), max_seq_len=9) as writer:
        writer.add_tokens(np.arange(9))
        columns = ([0, 0, 0], [2, 3, 2], [0, 0, 0], [4, 1, 4])
        writer.add_epoch(EpochIndex(*map(np.array, columns)))
    rows = RowPacking(5, 1, drop_last_batch=True, target_only=True)
    pairs, tokens = 2 * (2 * 2 + 3 + 4 + 5) + 3 * 3, 2 * 5 + 3
    mean_keys = plan_epochs(SampledData.open(tmp_path / "d"), rows, 1).mean_keys
    assert mean_keys == pytest.approx(pairs / tokens)


def test_data_that_makes_no_step_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", examples=2)
    with pytest.raises(ValueError, match=r"makes no step: its 2 examples are too few .* use fewer"):
        plan_epochs(data, packing(drop_last=False), 1)
    data = write_data(tmp_path / "more", examples=4)
    with pytest.raises(ValueError, match="or it is the last one, which is dropped"):
        plan_epochs(data, packing(drop_last=True), 1)


def test_an_example_longer_than_a_row_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    lengths = data.epoch(0).row_lengths()
    rows = RowPacking(int(lengths.max()) - 1, 2, drop_last_batch=True, target_only=True)
    with pytest.raises(ValueError, match=f"example {lengths.argmax()} has length {lengths.max()}"):
        plan_epochs(data, rows, 1)


def test_an_epoch_that_is_not_prepared_is_refused_at_once(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="2 prepared epochs, but epochs=3"):
        PrefixLMDataset(data, packing(), num_slots=64, epoch=2)
    with pytest.raises(FileNotFoundError, match="2 prepared epochs, but epochs=3"):
        plan_epochs(data, packing(), 3)


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    np.save(tmp_path / "data" / "tokens.npy", np.full(300, 700))
    with pytest.raises(ValueError, match=r"id 700 in one of the examples \[.* 0\.\.699"):
        batches_of(data, packing())
