"""`dry_run=true` goes the whole way of a run and leaves nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, files_in, run_pretrain, write_tiny_data

from data_io.row_planning import RowPacking, heaviest_cursors
from data_io.sampled_format import SampledData
from multipack_sampler import MultipackSampler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with data in it."""
    write_tiny_data(tmp_path / "work/data")
    return tmp_path / "work"


def test_a_dry_run_leaves_nothing(folder: Path) -> None:
    before = files_in(folder)
    done = run_pretrain(*TINY, "data.path=data", "epochs=2", "dry_run=true", cwd=folder).check()
    for line in (
        r"dry run +step 1 [\d.]+ s, step 2 [\d.]+ s, saving [\d.]+ s, loading [\d.]+ s",
        r"steps +\d+ like the last one would take [\d.e-]+ h",
        r"checkpoint +[\d.]+ MB, read back as it was saved",
        r"memory +[\d.]+ GiB at the peak, of this process",
    ):
        assert re.search(rf"^{line}$", done.stdout, re.M), line
    assert files_in(folder) == before
    assert not (folder / "checkpoints").exists()


def test_a_dry_run_of_a_stopped_run_leaves_it_as_it_is(folder: Path) -> None:
    line = (*TINY, "data.path=data", "epochs=2", "run_name=mine", "seed=3")
    run_pretrain(*line, "max_steps=3", cwd=folder).check()
    run = folder / "checkpoints/data/mine"
    before = files_in(run)
    done = run_pretrain(*line, "dry_run=true", cwd=folder).check()
    assert re.search(r"^continued +fsdp2_step_3", done.stdout, re.M)
    assert files_in(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["mine"]


def test_a_dry_run_finds_what_the_run_would_fail_on(folder: Path) -> None:
    line = (*TINY, "data.path=data", "epochs=2", "val_data.path=nowhere", "dry_run=true")
    done = run_pretrain(*line, cwd=folder)
    assert done.code == 2 and "nowhere is no folder of sampled data" in done.stderr


def test_the_heaviest_batches_are_those_of_long_examples(tmp_path: Path) -> None:
    data = SampledData.open(write_tiny_data(tmp_path / "data"))
    packing = RowPacking(64, num_replicas=1, drop_last_batch=True, target_only=True)
    lengths = data.epoch(0).row_lengths().astype(np.int64)
    rows = MultipackSampler(
        lengths, batch_max_length=64, num_replicas=1, rank=0, drop_last_batch=True
    )
    costs = {row.start_cursor: int((lengths[row.indices] ** 2).sum()) for row in rows}
    found = heaviest_cursors(data, packing)
    assert [costs[cursor] for cursor in found] == sorted(costs.values(), reverse=True)[:2]
