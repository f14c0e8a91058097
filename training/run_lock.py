"""One run in a directory at a time: a file in it names the process that trains there, on each disk.

A lock that a dead process of this machine left is taken over; whether a process of another machine
still runs cannot be seen from here, so its lock is never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_io.parsing import parse_json
from training.agreement import on_keepers
from training.distributed import World

LOCK_FILE = ".lock"
_MOST_PROCESS = 2**31 - 1
_TORN_S = 1.0  # a lock that still cannot be read after this was torn when the machine went down


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that trains in a directory."""

    host: str
    process: int
    begun: str  # tells it from a later process of the same number; "": not known here

    @classmethod
    def here(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _begun(os.getpid()) or "")

    def is_gone(self) -> bool:
        """Whether it was a process of this machine and runs no more."""
        if self.host != socket.gethostname():
            return False
        if not self.begun or not Path("/proc/self/stat").exists():
            return self.process == os.getpid() or not _answers(self.process)
        is_hidden = not Path(f"/proc/{self.process}").exists() and _answers(self.process)
        return _begun(self.process) != self.begun and not is_hidden  # another user's may be


def require_unlocked(run: Path) -> None:
    """ValueError where another process trains in the directory; changes nothing."""
    holder = _holder(run / LOCK_FILE)
    if holder and not holder.is_gone():
        _refuse(run, holder)


class RunLock:
    """The lock of a directory: wanted from entering on, held from `take` on, until it is left."""

    def __init__(self, run: Path, world: World) -> None:
        self.run = run
        self.world = world
        self._is_wanted = False

    def __enter__(self) -> RunLock:
        self._is_wanted = True
        return self

    def __exit__(self, *_: object) -> None:
        path = self.run / LOCK_FILE
        if self.world.is_keeper:
            with suppress(OSError):  # the disk is gone, say: a dead process has no lock
                if path.exists() and _holder(path) == Holder.here():
                    path.unlink()

    def take(self) -> list[str]:
        """Every rank calls it; what to say. ValueError on all of them: another run has it."""
        if not self._is_wanted:
            return []
        return [note for notes in on_keepers(self.world, self._take) for note in notes]

    def _take(self) -> list[str]:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            return self._write()
        except OSError as error:
            raise ValueError(
                f"nothing can be written to {self.run}: {error.strerror}; make room or give the "
                "right to write, or choose another checkpoint_path"
            ) from error

    def _write(self) -> list[str]:
        path, notes = self.run / LOCK_FILE, []
        with _alone(self.run):
            if path.exists():
                holder = _holder(path)
                if holder == Holder.here():
                    return []  # the run begins once more, from an earlier checkpoint
                if holder and not holder.is_gone():
                    _refuse(self.run, holder)
                whose = f"process {holder.process}, which is gone" if holder else "nobody"
                notes.append(f"lock        taken over from {whose}")
                path.unlink()
            try:
                with path.open("x") as file:
                    file.write(json.dumps(asdict(Holder.here())))
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:  # another one took it just now
                require_unlocked(self.run)
                raise
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return notes


def _refuse(run: Path, holder: Holder) -> None:
    if holder.host == socket.gethostname():
        raise ValueError(
            f"process {holder.process} trains in {run} already, and two would overwrite each "
            "other's checkpoints; wait for its end, stop it, or give another run_name"
        )
    raise ValueError(
        f"{run} is held by process {holder.process} of {holder.host}, and from here it cannot be "
        f"seen whether it still runs; if it does not, delete {run / LOCK_FILE}, else give another "
        "run_name"
    )


def _holder(path: Path) -> Holder | None:
    """Who has the lock; None: nobody, or it was torn."""
    deadline = time.monotonic() + _TORN_S
    while True:
        try:
            holder = Holder(**parse_json(path.read_text()))
            if isinstance(holder.process, int) and 0 < holder.process <= _MOST_PROCESS:
                return holder
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            pass  # it may be being written
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, where the file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _begun(process: int) -> str | None:
    """When a process began, in this uptime of the machine; None: it is dead, or it is not known."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{boot} {fields[18]}"  # a zombie has ended


def _answers(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
