"""The rank that keeps the others waiting is named, and what is known of where it is.

With several processes: slow. They are forked from one server; one of them sleeps, stops or dies.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import ROOT, TINY, Done, Started, start_command, write_tiny_data
from run_cases import ALONE

from training.distributed import World
from training.watchdog import EXIT_CODE, Seen, Sign, Verdict, Watchdog, is_broken_collective, judge

LIMIT_S = 60.0
WORKER = str(ROOT / "tests/hanging_worker.py")


def seen(rank: int, *, collectives: int = 9, silent_s: float = 0, still_s: float = 58) -> Seen:
    place = f"training/step.py:{rank}"
    return Seen(Sign(rank, "node", 40 + rank, 1, 12, collectives, True, place), silent_s, still_s)


def judged(*ranks: Seen) -> Verdict:
    verdict = judge({each.sign.rank: each for each in ranks}, LIMIT_S)
    assert verdict is not None
    return verdict


def test_a_rank_without_a_sign_of_life_is_blamed() -> None:
    verdict = judged(seen(0), seen(1, silent_s=57, collectives=10), seen(2))
    assert verdict.ranks == (1,)
    assert verdict.message == "rank 1 (node, process 41) has not answered for 57 s, after step 12"


def test_else_those_that_have_begun_the_fewest_collectives_are() -> None:
    verdict = judged(seen(0), seen(1, collectives=8), seen(2, collectives=8), seen(3))
    assert verdict.ranks == (1, 2)
    assert "rank 1 (node, process 41) has kept the others waiting for 58 s" in verdict.message
    assert "after step 12 at training/step.py:2" in verdict.message


def test_ranks_that_wait_for_one_another_blame_the_network() -> None:
    verdict = judged(seen(0), seen(1))
    assert verdict.ranks == (0, 1)
    assert "all 2 ranks have waited 58 s in one collective" in verdict.message
    assert "look at the network" in verdict.message


def test_a_rank_that_still_moves_and_ranks_that_all_compute_are_left_alone() -> None:
    slow = {0: seen(0), 1: seen(1, collectives=8, still_s=3)}
    assert judge(slow, LIMIT_S) is None
    busy = Seen(Sign(1, "node", 41, 1, 12, 9, False, "evaluation/watching.py:9"), 0, 58)
    assert judge({0: seen(0), 1: busy}, LIMIT_S) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:537] Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection"), False),
        (None, False),
    ],
)
def test_errors_of_collectives_are_told_from_mistakes(
    error: Exception | None, expected: bool
) -> None:
    assert is_broken_collective(error) is expected


@pytest.mark.parametrize(
    ("world", "minutes"),
    [(ALONE, 30.0), (World(rank=0, size=2, device=torch.device("cpu")), None)],
)
def test_one_rank_or_no_limit_needs_no_thread(world: World, minutes: float | None) -> None:
    with Watchdog(world, minutes) as watchdog:
        watchdog.step = 3
        assert watchdog._thread is None


def start_ranks(tmp_path: Path, mischief: str, *more: str) -> list[Started]:
    """Two ranks of a run in one folder, of which rank 1 does mischief."""
    data = write_tiny_data(tmp_path / "data", examples=200)
    folder = tmp_path / "runs"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [*TINY, f"data.path={data}", "epochs=1", "run_name=a", "data_workers=0", *more]
    environment = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MISCHIEF": f"{mischief}:{tmp_path / 'done'}",
    }
    started = []
    for rank in ("0", "1"):
        ours = environment | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(start_command(WORKER, *line, cwd=folder, environment=ours))
    return started


def end(started: Started) -> Done:
    """Its end; it is killed where it has not ended soon."""
    deadline = time.monotonic() + 10
    while started.code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if started.code is None and started.process.pid:
        os.kill(started.process.pid, signal.SIGKILL)
    return started.wait()


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_prints_its_stacks(tmp_path: Path) -> None:
    first, second = start_ranks(tmp_path, "sleep:1:5", "hang_minutes=0.2")
    done, hanging = first.wait(), end(second)
    assert (done.code, hanging.code) == (EXIT_CODE, EXIT_CODE)
    assert "error: rank 1 (" in done.stderr and "has kept the others waiting" in done.stderr
    assert "after step 4 at tests/hanging_worker.py:" in done.stderr
    assert "(misbehave); the same command goes on from the newest checkpoint" in done.stderr
    assert "Traceback" not in done.stderr + hanging.stderr
    assert "stacks of rank 1:" in hanging.stderr and "in misbehave" in hanging.stderr


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    first, second = start_ranks(tmp_path, "stop:1:5", "hang_minutes=0.2")
    done = first.wait()
    assert end(second).code == -signal.SIGKILL, "nothing of it runs any more"
    assert done.code == EXIT_CODE and "Traceback" not in done.stderr
    assert "error: rank 1 (" in done.stderr and "has not answered for" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("what", "code"), [("kill", -signal.SIGKILL), ("fail", 1)])
def test_a_rank_that_is_gone_is_named(tmp_path: Path, what: str, code: int) -> None:
    first, second = start_ranks(tmp_path, f"{what}:1:5", "hang_minutes=0.2")
    done, gone = first.wait(), end(second)
    assert gone.code == code
    assert done.code == EXIT_CODE and "Traceback" not in done.stderr
    assert "error: rank 1 (" in done.stderr and "is gone, last seen after step" in done.stderr
    assert not (tmp_path / "runs/checkpoints/data/a/.lock").exists(), "another node may go on"
