"""Readers of files that others may have written, tried on mutated ones as entry points use them.

A reader may take such a file, or refuse it with one of `CLEAN`, which entry points turn into one
line. All else is a fault: another exception, a write outside the folder, a process, a connection.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLEAN = (ValueError, OSError)
MOST_CHARACTERS = 20_000  # of a message
MOST_SECONDS = 3.0  # of CPU time
NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


@dataclass(frozen=True)
class Reader:
    """`files`: name -> kind of what is mutated. `mend`: done after, as one who forges would."""

    make: Callable[[Path], object]
    files: Mapping[str, str]
    read: Callable[[Path], object]
    mend: Callable[[Path], object] | None = None
    writes: bool = False  # beside what it reads: every example needs a folder of its own


class FaultError(Exception):
    """A reader did with a file what none may do."""


@dataclass
class Fuzzed:
    """A reader and its folder. `told` counts what it did with the examples."""

    name: str
    reader: Reader
    home: Path
    told: dict[str, int] = field(default_factory=lambda: {"accepted": 0, "refused": 0})

    def __post_init__(self) -> None:
        self.folder, self.valid = self.home / "folder", self.home / "valid"
        self.reader.make(self.folder)
        shutil.copytree(self.folder, self.valid)
        self.contents = {name: (self.folder / name).read_bytes() for name in self.reader.files}
        self.reader.read(self.folder)  # what is valid is taken

    def try_file(self, name: str, content: bytes) -> None:
        """Reads the folder with another content of a file. FaultError says what went wrong."""
        if self.reader.writes:
            shutil.rmtree(self.folder)
            shutil.copytree(self.valid, self.folder)
        path = self.folder / name
        path.write_bytes(content)
        started_at = time.process_time()
        try:
            if self.reader.mend:
                self.reader.mend(self.folder)
            with watched(self.home):
                self.reader.read(self.folder)
            self.told["accepted"] += 1
        except CLEAN as error:
            self.told["refused"] += 1
            if len(str(error)) > MOST_CHARACTERS:
                raise FaultError(f"a message of {len(str(error)):,} characters") from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise FaultError(f"{type(error).__name__}: {str(error)[:200]}") from error
        finally:
            path.write_bytes(self.contents[name])
        elapsed_s = time.process_time() - started_at
        if elapsed_s > MOST_SECONDS:
            raise FaultError(f"it took {elapsed_s:.1f} s")


_ALLOWED: list[Path] = []  # where writing is no fault; empty: nothing is watched


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """FaultError inside where something is written outside `folder`, or a process is started."""
    if not _HOOKED:
        sys.addaudithook(_look)  # for good: there is no way to take one away
        _HOOKED.append(True)
    _ALLOWED.append(folder.resolve())
    try:
        yield
    finally:
        _ALLOWED.pop()


_HOOKED: list[bool] = []


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if not _ALLOWED:
        return
    if event in NEVER:
        raise FaultError(f"{event} {arguments!r:.200}")
    if event in CHANGES:
        for path in arguments[: 2 if event == "os.rename" else 1]:
            _require_inside(event, path)
    if event == "open":
        path, mode, flags = arguments
        is_write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if isinstance(path, str | bytes) and (is_write or (mode and set(mode) & set("wax+"))):
            _require_inside(event, path)


def _require_inside(event: str, path: Any) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a descriptor
    place = Path(os.fsdecode(path)).resolve()
    if _ALLOWED and not place.is_relative_to(_ALLOWED[-1]) and place != Path(os.devnull):
        raise FaultError(f"{event} of {place}, outside the folder")
