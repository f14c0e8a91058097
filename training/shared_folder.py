"""Whether all ranks of a run see one folder: each writes its part of a checkpoint into it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import torch

from training.agreement import on_main
from training.distributed import World

PATIENCE_S = 10.0  # network file systems show new files late
POLL_S = 0.1


def require_shared(path: Path, world: World) -> None:
    """ValueError on every rank, naming those that do not see what rank 0 writes there.

    `path` need not exist yet: nothing is left behind.
    """
    if world.size == 1:
        return

    def begin() -> list[str]:
        parents = path.absolute().parents
        level = next(level for level, folder in enumerate(parents) if folder.is_dir())
        sign = parents[level] / f".seen_by_all.{uuid.uuid4().hex}"
        sign.touch()
        return [str(level), sign.name]

    level, name = on_main(world, begin)
    sign = path.absolute().parents[int(level)] / name
    sees = torch.zeros(world.size, dtype=torch.int32)
    sees[world.rank] = _appears(sign)
    blind = (world.sum(sees) == 0).nonzero().flatten().tolist()
    if world.is_main:
        sign.unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"rank {', '.join(map(str, blind))} does not see what rank 0 writes in {sign.parent}: "
            "all ranks save into one folder, so a node's own disk does not do; give a "
            "checkpoint_path on a file system that all nodes share, and start from the same folder"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
