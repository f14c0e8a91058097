"""When a run's checkpoints are written: while it waits, or beside it by a process of its own.

In the background, training stops only while its tensors are copied in memory. One save is under way
at a time: the next one, the end of the run and going back wait for it, and what went wrong with it
is raised there, on all ranks.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from training.agreement import errors_of_all, on_main
from training.checkpoint import Progress, RunDirectory
from training.checkpoint_writer import ANOTHER_RANK
from training.distributed import TIMEOUT
from training.host_copy import HostCopy, Piece, State, num_bytes_of, pieces_of, records_of
from training.interrupts import SIGNALS
from training.parts import prune_steps
from training.schema import RunConfig
from training.watchdog import is_broken_collective

MIN_BYTES = 64 << 20  # below, a plain save takes less than a second: no process for that
_ROOT = Path(__file__).resolve().parents[1]
_MEMORY = Path("/proc/meminfo")
_generations = itertools.count()  # of writers of this process: each has keys of its own


class WriterProcess:
    """The process beside this rank; see `checkpoint_writer`."""

    def __init__(self, directory: RunDirectory, pieces: list[Piece], timeout_s: float) -> None:
        self._directory = directory
        self._copy = HostCopy.allocated(pieces)
        self._connection, theirs = Pipe()
        handles = (theirs.fileno(), self._copy.descriptor)
        command = [sys.executable, "-m", "training.checkpoint_writer", *map(str, handles)]
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        settings = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        # It inherits which signals wait: those to stop are for this process alone, from the start.
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[s] for s in SIGNALS])
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid())],
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=handles,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
            theirs.close()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"saving/{attempt}/{next(_generations)}"
        self._send(
            {
                "run": str(directory.path),
                "rank": directory.world.rank,
                "size": directory.world.size,
                "disks": [asdict(disk) for disk in directory.world.disks],
                "pieces": records_of(pieces),
                "address": {"prefix": prefix, "timeout_s": timeout_s},
            }
        )
        self.is_busy = False
        self._error = ""

    def begin(self, state: State, job: Mapping[str, Any]) -> None:
        """Copies the state and has it written."""
        assert not self.is_busy
        self._copy.fill(state)
        self.is_busy = True
        self._send({**job, "data": self._directory.data})

    def error(self, *, waits: bool) -> str:
        """What has gone wrong so far, "" for nothing; `waits`: until nothing is under way."""
        while not self._error and (self.is_busy if waits else self._connection.poll()):
            try:
                self._error = self._connection.recv_bytes().decode()
            except (EOFError, ConnectionError):
                self._error = (
                    f"the process that writes checkpoints ended (exit code {self._process.wait()}),"
                    " maybe for lack of memory; save=plain writes them without one"
                )
            self.is_busy = False
        return self._error

    def stop(self) -> None:
        """Ends the process, whatever it is doing, and gives the memory back."""
        self._connection.close()
        if self.is_busy:
            self._process.kill()
        self._process.wait()
        self._copy.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except ConnectionError:  # it is gone: reading tells
            self.is_busy = True


class Saving:
    """How a run saves: entered while it trains. Every rank calls each method."""

    def __init__(
        self, directory: RunDirectory, keep_last: int | None, writer: WriterProcess | None
    ) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self._writer = writer
        self._is_settled = True

    @classmethod
    def begin(cls, config: RunConfig, directory: RunDirectory, state: State) -> tuple[Saving, str]:
        """Starts the process where one writes; also, for the summary, which way it is and why."""
        pieces = pieces_of(state)
        num_bytes = num_bytes_of(pieces)
        mode, reason = on_main(directory.world, lambda: list(_mode(config, num_bytes)))
        if mode == "plain":
            return cls(directory, config.keep_last, None), f"{mode} ({reason})"
        timeout_s = 60 * (config.hang_minutes or 0) or TIMEOUT.total_seconds()
        writer = WriterProcess(directory, pieces, timeout_s)
        note = f"{mode} ({reason}; {num_bytes / 1e6:,.0f} MB of memory for a copy)"
        return cls(directory, config.keep_last, writer), note

    def save(
        self, name: str, state: State, progress: Progress, log_state: Mapping[str, Any]
    ) -> None:
        """Publishes a checkpoint, now or soon, and then removes step checkpoints not kept."""
        prunes = name.startswith("fsdp2_step_")
        if self._writer is None:
            self.directory.save(name, state, progress, log_state)
            if prunes:
                prune_steps(self.directory, self.keep_last)
            return
        self.wait()
        job = {"name": name, "progress": asdict(progress), "log_state": dict(log_state)}
        self._writer.begin(state, {**job, "prunes": prunes, "keep_last": self.keep_last})
        self._is_settled = False

    def wait(self) -> None:
        """Until what was saved is published; OSError on every rank where one could not write."""
        if self._writer is None or self._is_settled:
            return
        errors = errors_of_all(self.directory.world, self._writer.error(waits=True))
        self._is_settled = True
        if errors:
            causes = [each for each in errors if not each.startswith(ANOTHER_RANK)]
            raise OSError((causes or errors)[0])

    def has_failed(self) -> bool:
        """Whether this rank knows that `wait` will raise; it waits for nothing."""
        return self._writer is not None and self._writer.error(waits=False) != ""

    def is_writing(self) -> bool:
        """Whether a save of this rank is under way; it waits for nothing."""
        return self._writer is not None and not self.has_failed() and self._writer.is_busy

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Waits for what is under way, unless the process is to end at once."""
        if self._writer is None:
            return
        try:
            if error is None:
                self.wait()
            elif isinstance(error, Exception) and not is_broken_collective(error):
                text = self._writer.error(waits=True)  # no word with ranks that may be elsewhere
                if text and text not in str(error):
                    print(f"the last save failed too: {text}", file=sys.stderr)
        finally:
            self._writer.stop()
            self._writer = None


def _mode(config: RunConfig, num_bytes: int) -> tuple[str, str]:
    """`plain` or `background`, and why; `num_bytes`: of the tensors of one rank."""
    can = hasattr(os, "memfd_create") and _MEMORY.exists()
    if config.dry_run:
        return "plain", "dry run"
    if config.save == "background" and not can:
        raise ValueError("save=background needs memfd, which Linux alone has; use save=plain")
    if config.save != "auto":
        return config.save, "asked for"
    if not can:
        return "plain", "background needs Linux"
    if num_bytes < MIN_BYTES:
        return "plain", f"{num_bytes / 1e6:,.1f} MB are written at once"
    wanted = num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    (line,) = (line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvail"))
    available = int(line.split()[1]) * 1024
    if available < 2 * wanted:
        return "plain", f"a copy of {wanted / 1e6:,.0f} MB does not fit well into free memory"
    return "background", "auto"
