"""The digests of a checkpoint's files: each rank lists those of its own; merged, they name all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from data_io.parsing import parse_json

DIGESTS_FILE = "digests.json"
_DAMAGED = "; the checkpoint is damaged, use another one"


def write_own_digests(staging: Path, rank: int) -> None:
    """The digests of what a rank wrote; rank 0 wrote each folder's index too."""
    files = [*staging.glob(f"*/__{rank}_*")]
    if rank == 0:
        files += staging.glob("*/.metadata")
    digests = {file.relative_to(staging).as_posix(): digest_of(file) for file in files}
    (staging / f"digests.{rank}.json").write_text(json.dumps(digests))


def take_digests(staging: Path) -> list[dict[str, str]]:
    """What each rank listed on this disk; their own lists are removed."""
    lists = []
    for part in sorted(staging.glob("digests.*.json")):
        lists.append(json.loads(part.read_text()))
        part.unlink()
    return lists


def read_digests(path: Path) -> dict[str, str]:
    """The list in a checkpoint, by the names of its files."""
    try:
        return dict(parse_json((path / DIGESTS_FILE).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / DIGESTS_FILE} cannot be read: {error}{_DAMAGED}") from None


def require_digest(path: Path, name: str, digests: Mapping[str, str]) -> None:
    """ValueError where a file is missing, is another one, or is not listed."""
    if not (path / name).is_file():
        raise ValueError(f"{path / name} is missing{_DAMAGED}")
    if digests.get(name) != digest_of(path / name):
        raise ValueError(f"{path / name} does not match its digest{_DAMAGED}")


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
