"""Which ranks of a run see one folder: each writes its part of a checkpoint into what it sees."""

from __future__ import annotations

import json
import socket
import time
import uuid
from dataclasses import replace
from pathlib import Path

from training.agreement import gathered, on_keepers
from training.distributed import Disk, World

PATIENCE_S = 10.0  # network file systems show new files late
POLL_S = 0.1
_MACHINE = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of one


def find_disks(path: Path, world: World) -> tuple[Disk, ...]:
    """The disks on which the ranks see `path`, for `World.disks`: none where all see one folder.

    `path` need not exist yet: nothing is left behind. ValueError on every rank where it cannot be
    told, since one sees what another writes and not the other way around.
    """
    if world.size == 1:
        return ()
    level, folder = _nearest(path)
    there, host = folder.stat(), socket.gethostname()[:200]
    machine = _MACHINE.read_text().strip() if _MACHINE.exists() else host
    own = {"machine": machine, "place": [there.st_dev, there.st_ino, level], "host": host}
    found = [json.loads(each) for each in gathered(world, json.dumps(own))]
    at: dict[str, list[int]] = {}
    for rank, each in enumerate(found):
        at.setdefault(f"{each['machine']} {each['host']} {each['place']}", []).append(rank)
    places = tuple(Disk(found[ranks[0]]["host"], tuple(ranks)) for ranks in at.values())
    if len(places) == 1:
        return ()
    seen = _seen(path, replace(world, disks=places), [found[p.keeper]["machine"] for p in places])
    disks: dict[tuple[bool, ...], Disk] = {}
    for place, row in zip(places, seen, strict=True):
        for other, its_row in zip(places, seen, strict=True):
            if its_row != row and row[places.index(other)]:
                raise ValueError(
                    f"{place} sees what {other} writes around {path}, but the two do not see the "
                    "same of all others; give a checkpoint_path on a file system that all nodes "
                    "share, or on each node's own disk, and start from the same folder"
                )
        ranks = (*(disks[row].ranks if row in disks else ()), *place.ranks)
        disks[row] = Disk(disks.get(row, place).host, tuple(sorted(ranks)))
    return tuple(disks.values()) if len(disks) > 1 else ()


def told_disks(disks: tuple[Disk, ...]) -> str:
    """For the summary."""
    return f"{', '.join(map(str, disks))}: each keeps its part of every checkpoint"


def _seen(path: Path, world: World, machines: list[str]) -> list[tuple[bool, ...]]:
    """For each place that a rank writes to (`world.disks`, on `machines`), which ones it sees."""
    own_level, folder = _nearest(path)
    sign = folder / f".seen_by_all.{uuid.uuid4().hex}"

    def leave() -> tuple[int, str]:
        sign.touch()
        return own_level, sign.name

    def look() -> list[bool]:
        parents, own = path.absolute().parents, machines[world.keepers.index(world.rank)]
        deadline = time.monotonic() + PATIENCE_S
        return [
            level < len(parents)
            and _appears(parents[level] / name, 0 if machine == own else deadline)
            for (level, name), machine in zip(signs, machines, strict=True)
        ]

    try:
        signs = on_keepers(world, leave)
        return [tuple(row) for row in on_keepers(world, look)]
    finally:
        sign.unlink(missing_ok=True)


def _nearest(path: Path) -> tuple[int, Path]:
    """The folder around `path` that exists, and how many levels it is up from it."""
    return next(each for each in enumerate(path.absolute().parents) if each[1].is_dir())


def _appears(path: Path, deadline: float) -> bool:
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
