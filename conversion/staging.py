"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_empty(out_dir: Path) -> None:
    """ValueError where the folder is there already and holds something."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"--out_dir {out_dir} is there and not empty; give another, or empty it")


@contextmanager
def written_aside(out_dir: Path) -> Iterator[Path]:
    """A folder on the same disk that becomes `out_dir` at the end, or is removed on any error."""
    home = next(parent for parent in out_dir.absolute().parents if parent.is_dir())
    aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.writing.", dir=home))
    aside.chmod(0o777 & ~_umask())  # mkdtemp makes it for its owner alone
    try:
        yield aside
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(out_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    """What this process takes away from new folders; it can only be read by being set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
