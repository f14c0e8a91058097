"""What is done to files of a run while nobody trains there, and to the disk below it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

from torture.plan import Disturbance

DAMAGES = ("checkpoint cut short", "checkpoint bit flipped", "checkpoint file deleted")
DISK_BYTES = 256 << 20
TORN_LINE = '{"step": 9999, "epo'


@cache
def can_mount() -> bool:
    """Whether small disks may be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        if not _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
            return False
        return _command("umount", folder)


def can_forbid_writing() -> bool:
    """Root may write to any folder that is not mounted read-only."""
    return os.geteuid() != 0 or can_mount()


@contextmanager
def small_disk(folder: Path, *, is_wanted: bool) -> Iterator[None]:
    """A disk of its own at `folder`, in memory."""
    if not is_wanted:
        yield
        return
    folder.mkdir(parents=True)
    _require(_mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)), folder)
    try:
        yield
    finally:
        kept = folder.with_name(f"{folder.name}.kept")
        shutil.copytree(folder, kept)
        _command("umount", "-l", str(folder))
        folder.rmdir()
        kept.rename(folder)


def resize_disk(folder: Path, room_bytes: int | None) -> None:
    """So much room is left on the disk; None: enough."""
    whole = os.statvfs(folder)
    used = (whole.f_blocks - whole.f_bfree) * whole.f_frsize
    size = DISK_BYTES if room_bytes is None else used + room_bytes
    _require(_mount("-o", f"remount,size={size}", str(folder)), folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written to the folder; root needs a mount for that."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)
        return
    _require(_mount("--bind", str(folder), str(folder)), folder)
    try:
        _require(_mount("-o", "remount,bind,ro", str(folder)), folder)
        yield
    finally:
        _command("umount", "-l", str(folder))


def damage_checkpoint(run: Path, what: Disturbance) -> tuple[str, Callable[[], None]] | None:
    """Damages a file of the newest checkpoint; its name, and what mends it. None: there is none."""
    found = [path for path in run.glob("fsdp2_*") if (path / "progress.json").is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: (path / "progress.json").stat().st_mtime_ns)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    file = files[int(what.share * len(files))]
    content = file.read_bytes()
    if what.kind == "checkpoint file deleted":
        file.unlink()
    elif what.kind == "checkpoint cut short":
        file.write_bytes(content[: int(what.share * len(content))])
    else:
        flipped = bytearray(content)
        flipped[int(what.share * len(content))] ^= 1 << int(what.share * 8)
        file.write_bytes(flipped)
    return file.relative_to(run).as_posix(), lambda: _write(file, content)


def change_data(data: Path, share: float) -> tuple[str, Callable[[], None]]:
    """Makes one token another; the name of the file, and what brings it back."""
    file = data / "tokens.npy"
    content, tokens = file.read_bytes(), np.load(file)
    at = int(share * len(tokens))
    tokens[at] = (tokens[at] + 1) % 256
    np.save(file, tokens)
    return file.name, lambda: _write(file, content)


def tear_metrics(run: Path) -> None:
    """As if the process had died in the middle of a line."""
    with suppress(FileNotFoundError), (run / "metrics.jsonl").open("a") as file:
        file.write(TORN_LINE)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _mount(*arguments: str) -> bool:
    return _command("mount", *arguments)


def _command(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _require(is_done: bool, folder: Path) -> None:
    if not is_done:
        raise OSError(f"{folder}: mount failed")
