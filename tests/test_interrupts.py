"""A run that is asked to stop saves, leaves, and goes on later as if it had never stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import TINY, Started, run_pretrain, start_command, write_tiny_data

from pretrain import CONFIG_DIR
from training.distributed import World
from training.interrupts import SaveSchedule, StopRequests
from training.tensor_store import read_tensors

PRETRAIN = str(CONFIG_DIR.parent / "pretrain.py")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """About 80 steps."""
    data = write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=200)
    return [*TINY, f"data.path={data}", "epochs=2", "run_name=a", "data_workers=0"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_pretrain(*settings, cwd=folder).check()
    return folder / "checkpoints/data/a"


def assert_same_end(run: Path, other: Path) -> None:
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = (read_tensors(r / "fsdp2_epoch_2" / kind) for r in (run, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def signal_after(started: Started, path: Path, number: int) -> None:
    while not path.exists():
        assert started.code is None, "it ended too early"
        time.sleep(0.005)
    pid = started.process.pid
    assert pid is not None
    os.kill(pid, number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_the_same_command_goes_on(
    name: str, settings: list[str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "checkpoints/data/a"
    started = start_command(PRETRAIN, *settings, "checkpoint_start=true", cwd=tmp_path)
    signal_after(started, run / "fsdp2_step_0", signal.Signals[name])
    done = started.wait()
    assert done.code == 75, "what a requeueing script can tell from an end"
    assert f"({name}); the same command goes on" in done.stdout
    saved = [path.name for path in run.glob("fsdp2_step_*") if path.name != "fsdp2_step_0"]
    assert len(saved) == 1
    goes_on = run_pretrain(*settings, cwd=tmp_path).check()
    assert f"{saved[0]}, step" in goes_on.stdout and "done:" in goes_on.stdout
    assert_same_end(run, whole)


def test_limits_stop_a_run_and_only_the_last_step_checkpoints_are_kept(
    settings: list[str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "checkpoints/data/a"
    saving = ["checkpoint_steps=2", "keep_last=2", "checkpoint_start=true"]
    done = run_pretrain(*settings, *saving, "max_steps=9", cwd=tmp_path).check()
    assert "stopped at step 9 (max_steps=9)" in done.stdout
    names = sorted(path.name for path in run.glob("fsdp2_*"))
    assert names == ["fsdp2_step_0", "fsdp2_step_8", "fsdp2_step_9"]
    split = ["micro_batch_size=40", "max_minutes=1000"]
    run_pretrain(*settings, *split, cwd=tmp_path).check()
    ours, theirs = (read_tensors(r / "fsdp2_epoch_2/model") for r in (run, whole))
    for tensor, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(tensor, other, atol=2e-2, rtol=0)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    settings: list[str], tmp_path: Path
) -> None:
    done = run_pretrain(*settings, "lr=1e30", "checkpoint_start=true", cwd=tmp_path)
    assert done.code == 1
    assert "is not finite" in done.stderr and "Lower lr" in done.stderr
    assert "examples [" in done.stderr and "fsdp2_step_0" in done.stderr
    assert "Traceback" not in done.stderr


def test_steps_that_are_done_are_not_overrun(settings: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        done = run_pretrain(*settings, "max_steps=9", cwd=tmp_path).check()
        assert "stopped at step 9 (max_steps=9); a larger one goes on" in done.stdout
    assert [path.name for path in tmp_path.glob("checkpoints/*/*/fsdp2_*")] == ["fsdp2_step_9"]


def test_a_second_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it in commands ended by &
    with StopRequests(ALONE, max_steps=None, max_minutes=None) as requests:
        assert requests.reason(1) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.reason(1) == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGINT) is before


def test_limits_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests = StopRequests(ALONE, max_steps=None, max_minutes=2)
    schedule = SaveSchedule(ALONE, None, 1)
    assert requests.reason(1) is None and not schedule.is_due(1)
    now[0] += 61
    assert requests.reason(2) is None
    assert schedule.is_due(2) and not schedule.is_due(3)
    now[0] += 60
    assert requests.reason(3) == "max_minutes=2"
