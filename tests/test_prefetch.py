"""The process that makes batches ahead: the same batches in the same order, and a clean end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from source_tree import ROOT

from models.batch import PackedBatch, PackedLayout
from training.prefetch import ROWS_AHEAD, Row, load_batches

IS_LINUX = sys.platform == "linux"


class Numbers:
    """Rows full of their own number; the batch's cursor is that number too."""

    row_size = 5

    def __init__(self, count: int) -> None:
        self.count = count

    def fill_rows(self, rows: Iterable[Row]) -> Iterator[tuple[Row, int]]:
        for number, row in zip(range(self.count), rows, strict=False):
            row[:] = number
            yield row, number
        if self.count < 0:
            raise ValueError("count must not be negative")

    def batch(self, row: Row, counts: int) -> PackedBatch:
        lens = torch.tensor([2])
        return PackedBatch(
            tokens=torch.from_numpy(row),
            labels=torch.from_numpy(row),
            positions=torch.from_numpy(row),
            layout=PackedLayout.from_lengths(lens, lens, num_slots=1),
            indices=torch.zeros(1, dtype=torch.int64),
            num_scored=0,
            global_num_scored=0,
            global_num_tokens=0,
            next_cursor=counts,
        )


def workers() -> list[int]:
    return [child.pid or 0 for child in multiprocessing.active_children()]


def is_alive(pid: int) -> bool:
    """A zombie counts as gone."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_arrive_in_order_and_stay_as_they_are(num_workers: int) -> None:
    batches = list(load_batches(Numbers(4 * ROWS_AHEAD), num_workers=num_workers))
    assert [batch.next_cursor for batch in batches] == list(range(4 * ROWS_AHEAD))
    for number, batch in enumerate(batches):
        assert batch.tokens.tolist() == [number] * 5


def test_a_slow_reader_finds_every_row_whole() -> None:
    for number, batch in enumerate(load_batches(Numbers(3 * ROWS_AHEAD), num_workers=1)):
        time.sleep(0.005)
        assert batch.tokens.tolist() == [number] * 5


def test_starting_draws_nothing_from_the_run_s_generator() -> None:
    state = torch.get_rng_state()
    list(load_batches(Numbers(2), num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_worker_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="count must not be negative") as caught:
        next(load_batches(Numbers(-1), num_workers=1))
    assert "in fill_rows" in caught.value.__notes__[0]


def test_more_workers_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers=2 must be 0 or 1"):
        load_batches(Numbers(1), num_workers=2)


@pytest.mark.parametrize("rows_read", [0, 1])
def test_the_worker_ends_with_the_iterator(rows_read: int) -> None:
    before = set(workers())
    batches = load_batches(Numbers(10**6), num_workers=1)
    for _ in range(rows_read):
        next(batches)
    (worker,) = set(workers()) - before
    del batches
    assert worker not in workers()


def test_a_worker_that_died_is_reported() -> None:
    before = set(workers())
    batches = load_batches(Numbers(10**6), num_workers=1)
    (worker,) = set(workers()) - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"died \(exit code -9\).*data_workers=0 makes them"):
        list(batches)


@pytest.mark.skipif(not IS_LINUX, reason="who sent a signal is known on Linux only")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_the_worker_at_work(number: signal.Signals) -> None:
    before = set(workers())
    batches = load_batches(Numbers(100), num_workers=1)
    next(batches)
    (worker,) = set(workers()) - before
    subprocess.run(["kill", f"-{number.name[3:]}", str(worker)], check=True)
    time.sleep(0.1)
    assert [batch.next_cursor for batch in batches] == list(range(1, 100))


SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import multiprocessing
from test_prefetch import Numbers
from training.prefetch import load_batches

batches = load_batches(Numbers(10**6), num_workers=1)
next(batches)
(child,) = multiprocessing.active_children()
print(child.pid, flush=True)
if sys.argv[3] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "raises":
    raise RuntimeError("in the loop")
"""


@pytest.mark.skipif(not IS_LINUX, reason="reads /proc")
@pytest.mark.parametrize(
    ("ending", "returncode"), [("killed", -signal.SIGKILL), ("raises", 1), ("ends", 0)]
)
def test_the_worker_ends_with_the_main_process(ending: str, returncode: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(ROOT / "tests"), ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == returncode, done.stderr
    assert bool(done.stderr) == (ending == "raises")
    assert wait_until(lambda: not is_alive(int(done.stdout)))


@pytest.mark.gpu
def test_pinned_batches_hold_the_same() -> None:
    for number, batch in enumerate(load_batches(Numbers(20), num_workers=1, pin_memory=True)):
        assert batch.tokens.is_pinned() and batch.layout.cu_seqlens.is_pinned()
        assert np.array_equal(batch.tokens.numpy(), np.full(5, number))
