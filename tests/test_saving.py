"""What is saved in the background is what a plain save writes, and nothing of it is ever lost in
silence or published for a run that is over.

It has more than 300 lines: the fast and the slow cases share how runs are started and compared.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import (
    PRETRAIN,
    ROOT,
    TINY,
    Done,
    Started,
    run_pretrain,
    start_command,
    write_tiny_data,
)
from run_cases import ALONE, TinyRun, run_config, whole_state

import training.saving
from training.checkpoint import Progress, RunDirectory, training_state
from training.checkpoint_checks import verify
from training.host_copy import HostCopy, pieces_from, pieces_of, records_of
from training.interrupts import StopRequests
from training.saving import Saving
from training.tensor_store import read_tensors

POISONED = str(ROOT / "tests/poisoned_run.py")
FOLDERS = ("model", "ema", "optimizer")


def started(run: TinyRun, keep_last: int | None = None) -> Saving:
    config = run_config(run.directory.path, save="background", keep_last=keep_last)
    state = training_state(run.model, run.optimizer)
    saving, note = Saving.begin(config, run.directory, state)
    assert re.fullmatch(r"background \(asked for; \d+ MB of memory for a copy\)", note)
    return saving


def save(saving: Saving, run: TinyRun, step: int) -> None:
    state = training_state(run.model, run.optimizer)
    saving.save(f"fsdp2_step_{step}", state, Progress(step=step), {"loss": 0.1 + 0.2})


def data_files(checkpoint: Path) -> dict[str, bytes]:
    """All but what a path or a random number stands in."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    names = (".metadata", "digests.json")
    return {str(f.relative_to(checkpoint)): f.read_bytes() for f in files if f.name not in names}


def test_another_process_saves_what_a_plain_save_does(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.directory.data = "sampled data"
    run.step()
    plain = RunDirectory(tmp_path / "plain", ALONE)
    plain.data = run.directory.data
    saved = {}
    with started(run, keep_last=2) as saving:
        for step in (1, 2, 3):
            saved[step] = whole_state(run.model, run.optimizer)
            state = training_state(run.model, run.optimizer)
            plain.save(f"fsdp2_step_{step}", state, Progress(step=step), {"loss": 0.1 + 0.2})
            save(saving, run, step)
            run.step()  # at once: what is saved must not be what it becomes
        assert saving.is_writing()
        before = [each.progress.step for each in run.directory.checkpoints()]
        assert before[-1] == 2  # the save of step 3 has waited for it
    found = run.directory.checkpoints()
    assert [each.progress.step for each in found] == [2, 3]
    assert verify(run.directory.path) == 0
    for checkpoint in found:
        expected = saved[checkpoint.progress.step]
        ours = {folder: read_tensors(checkpoint.path / folder) for folder in FOLDERS}
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)
        assert data_files(checkpoint.path) == data_files(plain.path / checkpoint.path.name)


def test_a_copy_is_shared_with_who_holds_its_descriptor() -> None:
    state = {"a": {"x": torch.randn(3, 5), "none": torch.empty(0, 4)}, "b": {"x": torch.tensor(7)}}
    state["b"]["half"] = torch.randn(6, 2).bfloat16().T  # its rows do not follow each other
    pieces = pieces_of(state)
    copy = HostCopy.allocated(pieces)
    other = HostCopy(pieces_from(records_of(pieces)), os.dup(copy.descriptor))
    copy.reserve()
    copy.fill(state)
    found = other.state()
    torch.testing.assert_close(found, state, atol=0, rtol=0, check_stride=False)
    del found
    for each in (copy, other):
        each.close()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, r"plain \(0\.\d MB are written at once\)"),
        ({"save": "plain"}, r"plain \(asked for\)"),
        ({"save": "background", "dry_run": True}, r"plain \(dry run\)"),
    ],
)
def test_it_says_when_and_why_training_waits(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    run = TinyRun(tmp_path / "run").create()
    state = training_state(run.model, run.optimizer)
    config = run_config(run.directory.path, keep_last=1, **settings)
    saving, note = Saving.begin(config, run.directory, state)
    assert re.fullmatch(told, note)
    with saving:
        for step in (1, 2):
            save(saving, run, step)
            assert [each.progress.step for each in run.directory.checkpoints()] == [step]


def test_auto_looks_at_size_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, large = run_config(tmp_path), 500 << 20
    memory = tmp_path / "meminfo"
    monkeypatch.setattr(training.saving, "_MEMORY", memory)
    memory.write_text("MemTotal: 9999999 kB\nMemAvailable: 2000000 kB\n")
    assert training.saving._mode(config, large) == ("background", "auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many copies
    assert training.saving._mode(config, large)[0] == "plain"
    monkeypatch.delattr(os, "memfd_create")
    assert training.saving._mode(config, large) == ("plain", "background needs Linux")
    with pytest.raises(ValueError, match="which Linux alone has; use save=plain"):
        training.saving._mode(run_config(tmp_path, save="background"), large)


def test_a_save_that_failed_stops_the_run() -> None:
    failed = False
    requests = StopRequests(ALONE, None, None, has_failed=lambda: failed)
    assert requests.reason(3) is None
    failed = True
    assert requests.reason(3) == "a checkpoint could not be written"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """About 80 steps."""
    data = write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=200)
    line = ("epochs=2", "data_workers=0", "checkpoint_steps=7", "keep_last=2")
    return [*TINY, f"data.path={data}", *line, "save=background"]


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, saved plainly."""
    folder = tmp_path_factory.mktemp("whole")
    run_pretrain(*settings, "save=plain", f"checkpoint_path={folder / 'run'}", cwd=folder).check()
    return folder / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def writer_of(process: int) -> int:
    """The number of the process that writes for this one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for child in map(int, children):
            if b"training.checkpoint_writer" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        time.sleep(0.01)
    raise AssertionError("there is no writer")


def is_gone(process: int) -> bool:
    """Waits a second for it."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_end(run: Path, other: Path) -> None:
    assert verify(run) == 0 and not list(run.glob(".*"))
    for kind in FOLDERS:
        ours, theirs = (read_tensors(r / "fsdp2_epoch_2" / kind) for r in (run, other))
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def assert_one_message(done: Done, told: str) -> None:
    assert done.code == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def begun(settings: list[str], run: Path) -> Iterator[Started]:
    """A run that has saved once."""
    work = run.parent / "work"
    work.mkdir()
    begun = start_command(str(PRETRAIN), *settings, f"checkpoint_path={run}", cwd=work)
    wait_for(run / "fsdp2_step_7")
    yield begun
    if begun.code is None:
        begun.process.kill()


@pytest.mark.slow
def test_a_signal_waits_for_the_newest_checkpoint(
    settings: list[str], whole: Path, run: Path, begun: Started
) -> None:
    assert begun.process.pid is not None
    os.kill(begun.process.pid, signal.SIGTERM)
    done = begun.wait()
    assert done.code == 75
    (stopped,) = re.findall(r"stopped at step (\d+)", done.stdout)
    assert (run / f"fsdp2_step_{stopped}").is_dir()
    goes_on = run_pretrain(*settings, f"checkpoint_path={run}", cwd=run.parent).check()
    assert re.search(rf"^continued +fsdp2_step_{stopped}, step", goes_on.stdout, re.M)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_that_publishes(
    settings: list[str], whole: Path, run: Path, begun: Started
) -> None:
    assert begun.process.pid is not None
    writer = writer_of(begun.process.pid)
    os.kill(writer, signal.SIGSTOP)  # in the middle of whatever it is doing
    begun.process.kill()
    begun.wait()
    assert is_gone(writer)
    run_pretrain(*settings, f"checkpoint_path={run}", cwd=run.parent).check()
    assert_same_end(run, whole)


def fill_disk(writer: int) -> None:
    resource.prlimit(writer, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def kill(writer: int) -> None:
    os.kill(writer, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "told"),
    [(fill_disk, "cannot be written: "), (kill, "checkpoints ended (exit code -9), maybe for")],
)
def test_what_goes_wrong_beside_ends_the_run_with_a_word(
    settings: list[str],
    whole: Path,
    run: Path,
    begun: Started,
    *,
    harm: Callable[[int], None],
    told: str,
) -> None:
    assert begun.process.pid is not None
    harm(writer_of(begun.process.pid))
    assert_one_message(begun.wait(), told)
    assert not (run / "fsdp2_epoch_2").exists() and not (run / ".lock").exists()
    run_pretrain(*settings, f"checkpoint_path={run}", cwd=run.parent).check()
    assert_same_end(run, whole)


@pytest.mark.slow
def test_going_back_waits_for_what_is_being_saved(
    settings: list[str], whole: Path, run: Path
) -> None:
    at = json.loads((whole / "fsdp2_step_91/progress.json").read_text())["cursor"]
    line = [*settings, "guard.policy=rewind", "guard.window=0"]
    ends = []
    for mode in ("plain", "background"):
        folder = run.parent / mode
        folder.mkdir()
        poisoned = (POISONED, *line, f"save={mode}", "checkpoint_path=run", "keep_last=4")
        started = start_command(*poisoned, cwd=folder, environment={"POISON": f"gradient@{at}"})
        assert re.findall(r"^back to \w+", started.wait().check().stdout, re.M)
        ends.append(folder / "run")
    assert_same_end(*ends)


def two_ranks(settings: list[str], run: Path) -> list[Started]:
    """The processes of a run, as SLURM starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    begun = []
    for rank in ("0", "1"):
        work = run.parent / f"{run.name}_{rank}"
        work.mkdir(exist_ok=True)
        environment = {**common, "RANK": rank, "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        line = (str(PRETRAIN), *settings, f"checkpoint_path={run}")
        begun.append(start_command(*line, cwd=work, environment=environment))
    return begun


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_save_together_and_learn_of_what_went_wrong_with_one(
    settings: list[str], run: Path
) -> None:
    plain = run.parent / "plain"
    for each in two_ranks([*settings, "save=plain"], plain):
        each.wait().check()
    begun = two_ranks(settings, run)
    wait_for(run / "fsdp2_step_7")
    assert begun[1].process.pid is not None
    fill_disk(writer_of(begun[1].process.pid))
    for each in begun:
        assert_one_message(each.wait(), "cannot be written: ")
    for each in two_ranks(settings, run):
        each.wait().check()
    assert_same_end(run, plain)
    for checkpoint in run.glob("fsdp2_*"):
        assert data_files(checkpoint) == data_files(plain / checkpoint.name)
