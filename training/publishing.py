"""Files and folders that appear under their names whole or not at all, synced to the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def empty_folder(path: Path) -> None:
    """Makes a folder, or makes it anew."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def publish(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`; what was there is then `replaced`."""
    for folder in (*(path for path in staging.iterdir() if path.is_dir()), staging):
        _sync(folder)
    if target.exists():
        target.rename(replaced(target))
    staging.rename(target)
    _sync(target.parent)


def drop_replaced(target: Path) -> None:
    """Removes what a folder has taken the place of; half of it is never found as `replaced`."""
    if replaced(target).exists():
        aside = target.with_name(f".{target.name}.removed")
        replaced(target).rename(aside)
        shutil.rmtree(aside)


def replaced(target: Path) -> Path:
    """Where a folder is while another one takes its place."""
    return target.with_name(f".{target.name}.replaced")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
