"""Lists the files of this repository for tests that read the sources. Owns no rule about them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a run or a user puts beside the sources (.gitignore), and what was made elsewhere (golden).
NOT_SOURCES = {"data", "checkpoints", "outputs", "multirun", "wandb", "shared", "tests/golden"}
HIDDEN_SOURCES = {".ci", ".github", ".gitignore"}


def is_source(path: Path) -> bool:
    """Whether a file or folder, relative to ROOT, belongs to the sources."""
    if path.name.startswith(".") and path.name not in HIDDEN_SOURCES:
        return False
    is_environment = (ROOT / path / "pyvenv.cfg").exists()
    return path.name != "__pycache__" and path.as_posix() not in NOT_SOURCES and not is_environment


def source_files() -> list[Path]:
    """All files of the sources, relative to ROOT, sorted."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        subfolders[:] = [name for name in subfolders if is_source(here / name)]
        files += [here / name for name in names if is_source(here / name)]
    return sorted(files)


def text_files() -> dict[Path, str]:
    """The text of every source file that is text, by its path relative to ROOT."""
    texts: dict[Path, str] = {}
    for path in source_files():
        try:
            texts[path] = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture, or an archive
            continue
    return texts


def product_files() -> list[Path]:
    """The Python files that are no tests, relative to ROOT."""
    return [path for path in source_files() if path.suffix == ".py" and path.parts[0] != "tests"]
