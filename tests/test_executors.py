"""Jobs in processes here and on a Ray cluster: the same results, and no process left behind."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from source_tree import ROOT

from data_io import executors
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.executors import ExecutorOptions, run_jobs, start_executor
from data_io.tokenize import main

TWO = ExecutorOptions(workers=2)


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def slow(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def unwatched(seconds: int) -> int:
    """Never looks again whether the parent lives."""
    executors.WATCH_SECONDS = 600
    return slow(seconds)


def refusing(number: int) -> int:
    raise OSError(f"job {number}")


def squares(jobs: list[int], options: ExecutorOptions) -> tuple[list[int], set[int]]:
    results = list(run_jobs(square, jobs, options))
    return sorted(value for value, _ in results), {process for _, process in results}


def test_one_job_or_worker_needs_no_further_process() -> None:
    assert squares([3], TWO) == ([9], {os.getpid()})
    assert squares([1, 2, 3], ExecutorOptions(workers=1)) == ([1, 4, 9], {os.getpid()})
    assert squares([], TWO) == ([], set())


def test_several_run_in_processes_that_end() -> None:
    values, processes = squares([1, 2, 3], TWO)
    assert values == [1, 4, 9] and os.getpid() not in processes
    with pytest.raises(OSError, match="job"):
        list(run_jobs(refusing, [1, 2], TWO))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match=r"worker process died, .*: workers=1"):
        list(run_jobs(killed, [1, 2, 3], TWO))
    assert not multiprocessing.active_children()


def test_leaving_early_stops_the_others() -> None:
    started_at = time.monotonic()
    results = run_jobs(slow, [0, 60, 60], TWO)
    assert next(results) == 0
    results.close()  # pyright: ignore[reportAttributeAccessIssue] -- it is a generator
    assert time.monotonic() - started_at < 30
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("job", ["slow", "unwatched"])
def test_workers_do_not_outlive_a_killed_parent(job: str) -> None:
    code = (
        "from data_io.executors import ExecutorOptions, run_jobs\n"
        f"from tests.test_executors import {job}\n"
        "if __name__ == '__main__':\n"
        f"    list(run_jobs({job}, [60, 60], ExecutorOptions(workers=2)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    until = time.monotonic() + 30
    while len(children.read_text().split()) < 3 and time.monotonic() < until:
        time.sleep(0.05)  # two workers, and multiprocessing's resource tracker
    workers = children.read_text().split()
    time.sleep(2)  # until they have begun
    run.kill()
    run.wait()
    while any(is_running(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ray_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"executor=ray needs Ray.*requirements-ray\.txt"):
        start_executor(ExecutorOptions(executor="ray"))


def tokenized(root: Path, output: str, *options: str) -> dict[str, bytes]:
    """Every file of tokenized data, made in the folder `output`."""
    main([str(root / "data"), "-o", str(root / output), f"tokenizer_path={root}", *options])
    return {
        path.relative_to(root / output).as_posix(): path.read_bytes()
        for path in (root / output).rglob("*")
        if path.is_file() and path.name != "tokenizer_info.json"  # it names the folder
    }


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "data").mkdir()
    for number in range(3):
        rows = [{"instruction": f"{number} {k}", "response": "r" * k} for k in range(1, 40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{number}.jsonl").write_text(lines)
    return tmp_path


def test_processes_tokenize_as_one_does(sources: Path) -> None:
    alone = tokenized(sources, "alone", "workers=1")
    assert tokenized(sources, "together", "workers=2") == alone
    assert len(alone) == 2 + 3 * 7


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_cluster_tokenizes_as_one_process_does(sources: Path) -> None:
    alone = tokenized(sources, "alone", "workers=1")
    assert tokenized(sources, "cluster", "executor=ray", "address=local") == alone
    (sources / "data" / "1.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"1\.jsonl, line 1 is no JSON"):
        tokenized(sources, "cluster", "executor=ray", "address=local")
