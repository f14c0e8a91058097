"""A folder in the making: it lies aside, hidden, until it is whole.

Its process holds a lock on it, so that what a killed run has left is known and removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from pathlib import Path


class Staging:
    """`path` is to be renamed to its final place, or goes when `close` is called."""

    def __init__(self, folder: Path) -> None:
        name = f".{folder.name}.partial-"
        for abandoned in folder.parent.glob(f"{glob.escape(name)}*"):
            _remove_abandoned(abandoned)
        self.path = folder.with_name(f"{name}{os.getpid()}")
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(folder: Path) -> None:
    """Removes what no process holds; ends in silence where that cannot be known."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
