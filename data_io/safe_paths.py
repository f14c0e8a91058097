"""Names and links of files that others gave: those that lead where they should not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def require_inside(names: Iterable[str]) -> None:
    """Refuses names that lead out of the folder they are put into."""
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or {"\\", "\0"} & set(name):
            raise ValueError(f"the file name {name!r} leads out of its folder; ask for others")


def leads_back(path: Path) -> bool:
    """Whether it is a link to a folder that it is in: following it would never end."""
    return path.is_symlink() and path.resolve() in [above.resolve() for above in path.parents]
