"""Starts the ranks of a run, hits them, and waits for their end as torchrun and srun do.

One rank, or several by environment variables, are forked from a process that has imported
everything: that saves seconds a start. Under torchrun each rank is a new interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from torture.child import (
    RELEASED,
    ROOT,
    VARIABLE,
    Orders,
    process_file,
    reached_file,
    run_pretrain,
)

PATIENCE_S = 900.0  # with a run that neither ends nor comes to its moment
GRACE_S = 10.0  # for ranks that are left alone by another one
POLL_S = 0.002
# A start of pretrain.py costs seconds of imports alone: they are done once.
PRELOADED = ["torture.child", "torture.preloaded", "pretrain", "torch._dynamo"]


@dataclass(slots=True)
class Ranks:
    """The processes of one run under way."""

    folder: Path
    attempt: int
    processes: list[BaseProcess | subprocess.Popen[bytes]] = field(default_factory=list)

    def codes(self) -> list[int | None]:
        """Exit codes, None for who still runs; a negative one is the signal that ended it."""
        return [
            each.poll() if isinstance(each, subprocess.Popen) else each.exitcode
            for each in self.processes
        ]

    def wait_for_moment(self, attempt: int) -> int | None:
        """Until the moment of that attempt has come: whose process it is; None: the run ended."""
        deadline = time.monotonic() + PATIENCE_S
        reached = reached_file(self.folder, attempt)
        while not reached.exists():
            if None not in self.codes():
                return None
            if any(self.codes()):  # a rank is lost before
                return None
            self._require_patience(deadline)
        return int(reached.read_text())

    def ends_within(self, cpu_seconds: float) -> bool:
        """Waits until rank 0 has computed so long: a busy machine changes nothing."""
        deadline = time.monotonic() + PATIENCE_S
        (pid, *_) = (process.pid for process in self.processes)
        begun = _cpu_seconds(pid)
        while None in (codes := self.codes()) and _cpu_seconds(pid) - begun < cpu_seconds:
            if any(codes):  # a rank is lost before
                return True
            self._require_patience(deadline)
        return None not in codes

    def hit(self, number: signal.Signals, victims: Sequence[int], attempt: int) -> None:
        """Sends a signal to ranks; those that have not begun yet are waited for."""
        deadline = time.monotonic() + PATIENCE_S
        for rank in victims:
            file = process_file(self.folder, attempt, rank)
            while not file.exists() and None in self.codes():
                self._require_patience(deadline)
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(file.read_text()), number)

    def release(self, attempt: int) -> None:
        """Lets who waits go on."""
        (self.folder / f"{RELEASED}.{attempt}").touch()

    def end(self) -> list[int]:
        """Waits for all; after one has failed, the others get a while, and are ended."""
        try:
            return self._wait()
        finally:
            self.kill()  # who waits was interrupted

    def _wait(self) -> list[int]:
        deadline, alone_since = time.monotonic() + PATIENCE_S, None
        while None in (codes := self.codes()):
            if any(code not in (None, 0, 75) for code in codes):
                alone_since = alone_since or time.monotonic()
                waited_s = time.monotonic() - alone_since
                if waited_s > GRACE_S:
                    self.kill(signal.SIGKILL if waited_s > 2 * GRACE_S else signal.SIGTERM)
            self._require_patience(deadline)
        return [code for code in codes if code is not None]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends whoever still runs."""
        for process, code in zip(self.processes, self.codes(), strict=True):
            if code is None and process.pid:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _require_patience(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.kill()
            raise TimeoutError(f"the run did not go on within {PATIENCE_S:g} s")
        time.sleep(POLL_S)


def start_ranks(
    folder: Path, arguments: Sequence[str], orders: Orders | None, *, attempt: int, ranks: int
) -> Ranks:
    """`pretrain.py ...` on one rank or, told of each other as by srun, on several."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    variables = {VARIABLE: _ordered(folder, attempt, [orders] if orders else [])}
    started = Ranks(folder, attempt)
    port = _free_port() if ranks > 1 else 0
    for rank in range(ranks):
        if ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            variables |= {"MASTER_PORT": str(port)}
        output = folder / f"said.{attempt}.{rank}"
        process = context.Process(target=_become, args=(folder, variables, arguments, output))
        process.start()
        started.processes.append(process)
    return started


def start_torchrun(
    folder: Path, arguments: Sequence[str], orders: Sequence[Orders], *, attempt: int, ranks: int
) -> Ranks:
    """The same under torchrun, which starts all ranks again after each of the orders."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", f"--max-restarts={len(orders)}"]
    command += ["--monitor-interval=0.1", "-m", "torture.child", *arguments]
    variables = {VARIABLE: _ordered(folder, attempt, orders), "PYTHONPATH": str(ROOT)}
    with (folder / f"said.{attempt}.torchrun").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder / "work",
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=output,
            stderr=output,
        )
    return Ranks(folder, attempt, [process])


def said(folder: Path, attempt: int) -> str:
    """What all ranks of an attempt printed."""
    return "".join(path.read_text() for path in sorted(folder.glob(f"said.{attempt}.*")))


def _ordered(folder: Path, attempt: int, orders: Sequence[Orders]) -> str:
    listed = [asdict(each) for each in orders]
    return json.dumps({"folder": str(folder), "first": attempt, "orders": listed})


def _become(folder: Path, variables: dict[str, str], arguments: list[str], output: Path) -> None:
    """Runs in the forked process: from here on it is pretrain.py."""
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder / "work")
    os.environ |= {"OMP_NUM_THREADS": "1", **variables}
    run_pretrain(list(arguments))


def _cpu_seconds(pid: int | None) -> float:
    """That a process has computed so far; endless where there is none any more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
