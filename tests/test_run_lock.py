"""Two runs started by mistake in one directory: the second refuses; a dead one's lock is no bar."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from commands import PRETRAIN, TINY, files_in, run_pretrain, start_command, write_tiny_data
from run_cases import ALONE, TinyRun

import training.run_lock
from training.checkpoint import CONFIG_FILE
from training.run_lock import LOCK_FILE, Holder, RunLock, require_unlocked
from training.starting import agree_on_start, find_start


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def holder_of(process: int) -> Holder:
    return Holder(socket.gethostname(), process, training.run_lock._begun(process) or "")


def leave_lock(run: Path, holder: Holder) -> Path:
    run.mkdir(exist_ok=True)
    (run / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return run


def test_a_lock_is_held_from_taking_to_leaving(tmp_path: Path) -> None:
    lock, run = RunLock(tmp_path / "run", ALONE), tmp_path / "run"
    assert lock.take() == [] and not run.exists()  # nobody has entered it
    with lock:
        assert not run.exists()
        assert lock.take() == []
        assert json.loads((run / LOCK_FILE).read_text()) == asdict(Holder.here())
        assert lock.take() == []  # once more: it is this process's own
    assert list(run.iterdir()) == []


def test_a_lock_of_a_living_process_is_respected(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run = leave_lock(tmp_path / "run", holder_of(sleeper.pid))
    before = files_in(run)
    told = rf"process {sleeper.pid} trains in .*run already, .* give another run_name"
    with pytest.raises(ValueError, match=told):
        require_unlocked(run)
    with RunLock(run, ALONE) as lock, pytest.raises(ValueError, match=told):
        lock.take()
    assert files_in(run) == before  # leaving did not remove what is another's


def test_a_lock_of_a_dead_process_is_taken_over(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run = leave_lock(tmp_path / "run", holder_of(sleeper.pid))
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
    require_unlocked(run)
    with RunLock(run, ALONE) as lock:
        told = f"lock        taken over from process {sleeper.pid}, which is gone"
        assert lock.take() == [told]
        assert json.loads((run / LOCK_FILE).read_text()) == asdict(Holder.here())


def test_a_later_process_of_the_same_number_is_not_the_holder(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    holder = replace(holder_of(sleeper.pid), begun="another-boot 12345")
    with RunLock(leave_lock(tmp_path / "run", holder), ALONE) as lock:
        assert lock.take() != []


def test_without_a_time_of_birth_the_number_alone_counts(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """Where there is no /proc."""
    run = leave_lock(tmp_path / "run", replace(holder_of(sleeper.pid), begun=""))
    with pytest.raises(ValueError, match="trains in"):
        require_unlocked(run)
    sleeper.kill()
    sleeper.wait()
    require_unlocked(run)


def test_a_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    run = leave_lock(tmp_path / "run", Holder("node-7", 2**22 + 1, "boot 1"))
    told = r"held by process \d+ of node-7, .* delete .*run/\.lock, else give another run_name"
    with pytest.raises(ValueError, match=told):
        require_unlocked(run)
    with RunLock(run, ALONE) as lock, pytest.raises(ValueError, match=told):
        lock.take()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', '{"host":"a","process":-1}'])
def test_a_torn_lock_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(training.run_lock, "_TORN_S", 0.0)
    (tmp_path / LOCK_FILE).write_text(text)
    require_unlocked(tmp_path)
    with RunLock(tmp_path, ALONE) as lock:
        assert lock.take() == ["lock        taken over from nobody"]


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with RunLock(tmp_path, ALONE) as lock:
        with pytest.raises(ValueError, match=r"nothing can be written to .*: No space left on de"):
            lock.take()
        assert list(tmp_path.iterdir()) == []


def race(run: Path, start: Any, outcomes: Any) -> None:
    with RunLock(run, ALONE) as lock:
        start.wait()
        try:
            lock.take()
            outcomes.put("has it")
        except ValueError:
            outcomes.put("refused")
        start.wait()  # nobody leaves before all have tried


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_several_that_start_at_once_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stale: bool
) -> None:
    def read_slowly(path: Path) -> Holder | None:
        found = read(path)
        time.sleep(0.1)  # as long as others need to look
        return found

    run, read = tmp_path / "run", training.run_lock._holder
    monkeypatch.setattr(training.run_lock, "_holder", read_slowly)
    if is_stale:
        leave_lock(run, replace(Holder.here(), process=2**22 + 1))
    context = multiprocessing.get_context("fork")
    start, outcomes = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(run, start, outcomes)) for _ in range(4)]
    for each in racers:
        each.start()
    found = sorted(outcomes.get(timeout=60) for _ in racers)
    for each in racers:
        each.join()
    assert found == ["has it", "refused", "refused", "refused"]


def test_what_another_run_is_writing_is_not_touched(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    replaced = tmp_path / "run/.fsdp2_step_3.replaced"  # as it is for a moment in saving again
    (tmp_path / "run/fsdp2_step_3").rename(replaced)
    leave_lock(tmp_path / "run", holder_of(sleeper.pid))
    with pytest.raises(ValueError, match="trains in"):
        agree_on_start(run.directory, run.config)
    assert replaced.is_dir()
    sleeper.kill()
    sleeper.wait()
    assert agree_on_start(run.directory, run.config).progress.step == 3


def test_what_a_run_leaves_that_was_killed_at_its_very_beginning_is_no_bar(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    leave_lock(tmp_path / "run", replace(Holder.here(), process=2**22 + 1))
    (tmp_path / "run" / f".{CONFIG_FILE}.writing").write_text("arch: {")
    assert find_start(run.directory, run.config).checkpoint is None
    (tmp_path / "run/.profile").write_text("precious")
    with pytest.raises(ValueError, match="holds something, but no run"):
        find_start(run.directory, run.config)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Thousands of steps."""
    data = write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=20_000, epochs=1)
    line = ("epochs=1", "run_name=a", "data_workers=0", "checkpoint_steps=7", "keep_last=null")
    return [*TINY, f"data.path={data}", *line]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_of_two_commands_refuses_and_the_first_goes_on(
    settings: list[str], tmp_path: Path
) -> None:
    folder, run = tmp_path / "work", tmp_path / "work/checkpoints/data/a"
    folder.mkdir()
    first = start_command(str(PRETRAIN), *settings, cwd=folder)
    wait_for(run / "fsdp2_step_7")
    second = run_pretrain(*settings, cwd=folder)
    assert first.code is None
    assert second.code == 2 and "Traceback" not in second.stderr
    assert f"error: process {first.process.pid} trains in checkpoints/data/a" in second.stderr
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGTERM)
    assert first.wait().code == 75  # saved: the second one has taken nothing from it
    assert not (run / LOCK_FILE).exists()

    killed = start_command(str(PRETRAIN), *settings, cwd=folder)
    wait_for(run / LOCK_FILE)
    killed.process.kill()
    killed.wait()
    assert (run / LOCK_FILE).exists()
    goes_on = run_pretrain(*settings, "max_steps=1", cwd=folder).check()
    assert f"lock        taken over from process {killed.process.pid}, which" in goes_on.stdout
    assert not (run / LOCK_FILE).exists()


@pytest.mark.dist
@pytest.mark.slow
def test_rank_0_holds_the_lock_of_several(settings: list[str], tmp_path: Path) -> None:
    folder, run = tmp_path / "work", tmp_path / "work/checkpoints/data/a"
    folder.mkdir()
    line = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PRETRAIN))
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    sharded = [*settings, "global_batch_size=128"]
    first = start_command(*line, *sharded, cwd=folder, environment=threads)
    wait_for(run / "fsdp2_step_7")
    holder = json.loads((run / LOCK_FILE).read_text())["process"]
    second = start_command(*line, *sharded, cwd=folder, environment=threads).wait()
    assert first.code is None
    assert second.code != 0
    assert f"error: process {holder} trains in checkpoints/data/a" in second.stderr
    os.kill(holder, signal.SIGTERM)
    first.wait()
    assert not (run / LOCK_FILE).exists()
