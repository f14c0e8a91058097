"""`python -m training.checkpoint verify DIR`: every file of a run's checkpoints, or of one of them,
against its digest. Exit code 0: all are as they were written; 1: some are not; 2: there are none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from training.checkpoint import BEST, PROGRESS_FILE, read_checkpoint
from training.digests import DIGESTS_FILE

DAMAGED = 1  # exit code


def checkpoints_in(folder: Path) -> list[Path]:
    """The folder itself where it is a checkpoint, else those of a run; FileNotFoundError: none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name a run directory or a checkpoint")
    if folder.name.startswith("fsdp2_") or (folder / DIGESTS_FILE).exists():
        return [folder]
    found = sorted(folder.glob("fsdp2_*"), key=_order)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint (fsdp2_epoch_N, fsdp2_step_N, {BEST}); name a run "
            "directory or a checkpoint"
        )
    return found


def checked(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each file of a checkpoint, and what is wrong with it; None: nothing."""
    try:
        checkpoint = read_checkpoint(path)
    except (ValueError, OSError) as error:
        yield path.name, str(error)
        return
    for name in (DIGESTS_FILE, PROGRESS_FILE):
        yield f"{path.name}/{name}", None
    for name, damage in checkpoint.checked_files():
        yield f"{path.name}/{name}", damage


def verify(folder: Path) -> int:
    """Prints a line for each file; how many are damaged."""
    found = checkpoints_in(folder)
    damaged = 0
    for path in found:
        for name, damage in checked(path):
            print(f"FAIL  {damage}" if damage else f"ok    {name}", flush=True)
            damaged += damage is not None
    told = f"{damaged} damaged" if damaged else "sound"
    print(f"{folder}: {len(found)} checkpoint{'s' * (len(found) != 1)}, {told}")
    return damaged


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.checkpoint", description=__doc__)
    parser.add_argument("command", choices=("verify",))
    parser.add_argument("folder", type=Path, help="run directory, or one checkpoint")
    arguments = parser.parse_args()
    try:
        damaged = verify(arguments.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(DAMAGED if damaged else 0)


def _order(path: Path) -> tuple[str, int]:
    kind, _, number = path.name.rpartition("_")
    return kind, int(number) if number.isdecimal() else 0
