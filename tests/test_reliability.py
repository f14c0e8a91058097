"""What a disk can do to a run: full, not to be written to, a checkpoint changed; it goes on as if
nothing had happened, bit for bit."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    PRETRAIN,
    TINY,
    Done,
    assert_refused,
    run_pretrain,
    start_command,
    write_tiny_data,
)
from run_cases import ALONE

from training.checkpoint import Progress
from training.checkpoint_checks import verify
from training.run_lock import LOCK_FILE
from training.telemetry import MetricsLogger, read_metrics
from training.tensor_store import read_tensors

NOT_WRITABLE = "/proc/no-run"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """About 80 steps."""
    data = write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=200)
    line = ("epochs=2", "run_name=a", "data_workers=0", "checkpoint_steps=7", "keep_last=2")
    return [*TINY, f"data.path={data}", *line, "log_interval=3"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run_pretrain(*settings, cwd=folder).check()
    return folder / "checkpoints/data/a"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work/checkpoints/data/a"


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, averages, optimizer state and metrics, bit for bit."""
    assert verify(run) == 0
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = (read_tensors(r / "fsdp2_epoch_2" / kind) for r in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind
    assert lines_of(run) == lines_of(other)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_stopped_with_a_word(done: Done, told: str) -> None:
    assert done.code == 2
    assert done.stderr.count("error: ") == 1 and told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process: Linux")
def test_a_disk_that_is_full_while_saving(settings: list[str], whole: Path, run: Path) -> None:
    started = start_command(str(PRETRAIN), *settings, cwd=run.parents[2])
    wait_for(run / "fsdp2_step_7")
    assert started.process.pid is not None
    unlimited = resource.RLIM_INFINITY
    resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (20_000, unlimited))
    assert_stopped_with_a_word(started.wait(), "cannot be written: ")
    assert not (run / "fsdp2_epoch_2").exists()
    assert verify(run) == 0  # what was published before is whole
    assert not (run / LOCK_FILE).exists()
    goes_on = run_pretrain(*settings, cwd=run.parents[2]).check()
    assert re.search(r"^continued +fsdp2_step_", goes_on.stdout, re.M)
    assert not list(run.glob(".fsdp2_*"))
    assert_same_end(run, whole)


def test_a_newest_checkpoint_that_changed_on_the_disk(
    settings: list[str], whole: Path, run: Path
) -> None:
    run_pretrain(*settings, "max_steps=16", cwd=run.parents[2]).check()
    file = run / "fsdp2_step_16/optimizer/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
    (run / "metrics.jsonl").open("a").write('{"step": 17, "epo')
    assert verify(run) == 1
    goes_on = run_pretrain(*settings, cwd=run.parents[2]).check()
    (told,) = [line for line in goes_on.stdout.splitlines() if "skipped a checkpoint" in line]
    assert f"{file.relative_to(run.parents[2])} does not match its digest" in told
    assert re.search(r"^continued +fsdp2_step_14, step 14$", goes_on.stdout, re.M)
    assert not file.exists()  # pruned: later ones are good
    assert_same_end(run, whole)


def test_lines_before_a_checkpoint_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that goes down takes none of them: a continued run does not write them again."""
    logger = MetricsLogger(tmp_path, ALONE, log_interval=1, total_steps=9, start=Progress())
    logger.state()  # there is no file yet
    logger.record(Progress(step=1), {"val/loss": 1.0})
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    logger.state()
    assert synced == [logger.path.stat().st_ino]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_becomes_read_only(settings: list[str], whole: Path, run: Path) -> None:
    started = start_command(str(PRETRAIN), *settings, cwd=run.parents[2])
    wait_for(run / "fsdp2_step_7")
    with read_only(run):
        assert_stopped_with_a_word(started.wait(), "Permission denied")
        assert_refused(run.parents[2], *settings, told=("nothing can be written to", "make room"))
    assert verify(run) == 0
    run_pretrain(*settings, cwd=run.parents[2]).check()
    assert_same_end(run, whole)


def test_a_place_where_nothing_can_be_written(settings: list[str], run: Path) -> None:
    line = [each for each in settings if not each.startswith("run_name")]
    told = (f"nothing can be written to {NOT_WRITABLE}: ", "choose another checkpoint_path")
    assert_refused(run.parents[2], *line, f"checkpoint_path={NOT_WRITABLE}", told=told)
