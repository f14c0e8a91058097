"""Examples in a sampled folder: each where its epoch says, with a mask only where one is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_io.example_writer import ExampleWriter
from data_io.examples import Example
from data_io.sampled_format import SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter

PLAIN = [Example([1, 2], [3]), Example([4], [5, 6])]
MASKED = Example([7], [8, 9], [0, 1])


def write(folder: Path, batches: list[list[Example]], orders: list[list[int]]) -> SampledData:
    info = TokenizerInfo(vocab_size=300)
    with SampledWriter(folder, info, max_seq_len=9, scored=True) as writer:
        examples = ExampleWriter(writer)
        for batch in batches:
            examples.add(batch)
        assert examples.lengths.tolist() == [len(each) for batch in batches for each in batch]
        examples.finish(np.array(order) for order in orders)
    return SampledData.open(folder)


def test_epochs_name_examples_by_number(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [PLAIN, [], [MASKED]], [[2, 0, 1], [1, 1, 2]])
    tokens = data.tokens().tolist()
    examples = [*PLAIN, MASKED]
    for epoch, order in enumerate([[2, 0, 1], [1, 1, 2]]):
        index = data.epoch(epoch)
        for at, number in enumerate(order):
            start, begin = index.inst_start[at], index.resp_start[at]
            example = examples[number]
            assert tokens[start : start + index.inst_len[at]] == example.inst_ids
            assert tokens[begin : begin + index.resp_len[at]] == example.resp_ids
    scored = data.scored()
    assert scored is not None and scored.tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1]


def test_a_mask_of_ones_is_left_out(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [PLAIN], [[0, 1]])
    assert not data.metadata.scored and data.scored() is None
    assert not (data.folder / "scored.npy").exists()
    assert data.metadata.total_length == 6


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not all in 0\.\.299"):
        write(tmp_path / "data", [[Example([1], [300])]], [[0]])
    assert not any(tmp_path.iterdir())
