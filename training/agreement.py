"""What the ranks of a run tell one another: texts, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import torch

from training.distributed import World

MAX_BYTES = 1024  # of a text that is gathered
T = TypeVar("T")  # what JSON has: the same on the other side


def on_main(world: World, decide: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; its ValueError or OSError is a ValueError on all of them."""
    found = json.loads(world.broadcast(_found(decide) if world.is_main else ""))
    if "error" in found:
        raise ValueError(found["error"])
    return found["value"]


def on_keepers(world: World, act: Callable[[], T]) -> list[T]:
    """What each disk's keeper finds, on all ranks, rank 0's disk first; they act at the same time.

    The ValueError or OSError of one is one on all ranks, and names its disk where there are
    several. It is a barrier: nobody goes on before all have acted.
    """
    if world.size == 1:
        return [act()]
    own = _found(act) if world.is_keeper else ""
    found = [json.loads(world.broadcast(own, keeper)) for keeper in world.keepers]
    for number, each in enumerate(found):
        if "error" in each:
            where = f"{world.disks[number]}: " if world.disks else ""
            raise (OSError if each["is_of_system"] else ValueError)(f"{where}{each['error']}")
    return [each["value"] for each in found]


def errors_of_all(world: World, own: str) -> list[str]:
    """What went wrong, cut short, on all ranks; `own` is "" where nothing did."""
    text = own.encode()[:MAX_BYTES].decode(errors="ignore")
    return [each for each in gathered(world, text) if each]


def gathered(world: World, text: str) -> list[str]:
    """The text of every rank, on all ranks."""
    data = text.encode()
    assert len(data) <= MAX_BYTES, len(data)
    table = torch.zeros(world.size, MAX_BYTES, dtype=torch.int32)
    table[world.rank, : len(data)] = torch.tensor(list(data), dtype=torch.int32)
    rows = world.sum(table).to(torch.uint8).numpy()
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def _found(act: Callable[[], object]) -> str:
    try:
        return json.dumps({"value": act()}, default=str)  # YAML knows dates
    except (ValueError, OSError) as error:
        return json.dumps({"error": str(error), "is_of_system": isinstance(error, OSError)})
