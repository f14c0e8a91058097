"""Ranks that are not alike, do not come or are lost are named, with a code and no traceback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import ROOT, Done, Started, start_command, write_tiny_data

from scripts.check_distributed import differences, flat, sizes, sources
from training.watchdog import EXIT_CODE

CHECK = "scripts/check_distributed.py"
QUICK = ("check.largest_mb=1", "check.repeats=1", "check.device=cpu")


def start(cwd: Path, *lines: Sequence[str], size: int, roots: Sequence[Path] = ()) -> list[Started]:
    """Ranks 0, 1, ... of `size`, each with its own arguments and sources."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank, line in enumerate(lines):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        script = (roots[rank] if roots else ROOT) / CHECK
        started.append(start_command(str(script), *line, cwd=cwd, environment=environment))
    return started


def ends(started: Sequence[Started]) -> list[Done]:
    done = [each.wait() for each in started]
    assert not any("Traceback" in each.stderr + each.stdout for each in done)
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_what_is_unusual_is_named_by_rank() -> None:
    usual = {"a": "1", "b": "2"}
    assert differences([usual, usual, usual]) == {}
    assert differences([usual, {"a": "1", "b": "3"}, usual]) == {1: "b is 3, not 2"}
    assert differences([{"a": "1"}, usual]) == {1: "b is 2, not nothing"}
    many = {str(number): "x" for number in range(9)}
    assert differences([{}, {}, many])[2].endswith("and 6 more")


def test_configurations_and_sizes_are_listed() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": "x"}) == [
        ("a.b", "1"),
        ("a.c.d", "None"),
        ("e", "x"),
    ]
    assert sizes(0) == [1 << 16] and sizes(1 << 20) == [1 << 16, 1 << 18, 1 << 20]
    assert {"pretrain.py", "training/step.py", "config/cfg_pretrain.yaml"} <= set(sources())


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_are_alike_are_timed(folder: Path, size: int) -> None:
    done = ends(start(folder, *[QUICK] * size, size=size))
    assert [each.code for each in done] == [0] * size, done[0].stderr
    assert f"sources       alike on {size} ranks" in done[0].stdout
    rows = done[0].stdout.partition("GB/s")[2].splitlines()[1:]
    assert rows[0].split() == ["KiB", "all-reduce", "all-gather", "reduce-scatter"]
    assert [row.split()[0] for row in rows[1:]] == ["64", "256", "1,024"]
    assert all(float(figure) > 0 for row in rows[1:] for figure in row.split()[1:])


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(folder: Path) -> None:
    line = (*QUICK, "check.timeout_s=3")
    done = ends(start(folder, line, line, size=3))
    assert [each.code for each in done] == [1, 1]
    told = "error: rank 2 did not answer within 3 s; these did: 0 ("
    assert told in done[0].stderr and done[1].stderr == ""


def test_other_variables_and_one_process_alone_are_refused(folder: Path) -> None:
    done = start_command(str(ROOT / CHECK), cwd=folder).wait()
    assert done.code == 2 and "start it with torchrun" in done.stderr
    done = start_command(str(ROOT / CHECK), "check.timeout=3", cwd=folder).wait()
    assert done.code == 2 and "did you mean check.timeout_s?" in done.stderr


@pytest.mark.slow
def test_other_sources_data_and_settings_are_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in sources():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, other / name)
    with (other / "training/schedule.py").open("a") as file:
        file.write("# changed\n")
    data = [write_tiny_data(tmp_path / name, examples=n) for name, n in (("a", 60), ("b", 61))]
    lines = [
        (*QUICK, "arch/size@arch=nano", "global_batch_size=64", f"data.path={path}", f"lr={lr}")
        for path, lr in zip(data, ("1e-3", "2e-3"), strict=True)
    ]
    done = ends(start(folder, *lines, size=2, roots=[ROOT, other]))
    assert [each.code for each in done] == [1, 1]
    assert "this would not train as one run" in done[0].stderr
    by_kind = {line.split()[0]: line for line in done[0].stdout.splitlines()}
    assert "alike on 2 ranks" in by_kind["packages"]
    assert "DIFFERENT on rank 1 (" in by_kind["sources"]
    assert "): training/schedule.py is " in by_kind["sources"]
    assert "lr is 0.002, not 0.001" in by_kind["configuration"]
    assert "fingerprint is " in by_kind["data"]


@pytest.mark.slow
def test_a_rank_that_stops_on_the_way_is_named(folder: Path) -> None:
    line = ("check.largest_mb=16", "check.repeats=100000", "check.device=cpu", "check.timeout_s=6")
    started = start(folder, line, line, size=2)
    while "GB/s" not in started[0].output.read_text():
        assert started[0].code is None
        time.sleep(0.1)
    pid = started[1].process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    done = started[0].wait()
    os.kill(pid, signal.SIGKILL)
    assert done.code == EXIT_CODE and "Traceback" not in done.stderr
    assert "error: rank 1 (" in done.stderr and "; run this check again" in done.stderr
