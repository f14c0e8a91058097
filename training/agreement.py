"""What the ranks of a run tell one another before it begins: texts, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from training.distributed import World

MAX_BYTES = 1024  # of a text that is gathered


def on_main(world: World, decide: Callable[[], list[str]]) -> list[str]:
    """What rank 0 finds, on all ranks; its ValueError or OSError is a ValueError on all of them."""
    found: dict[str, str | list[str]] = {}
    if world.is_main:
        try:
            found = {"lines": decide()}
        except (ValueError, OSError) as error:
            found = {"error": str(error)}
    found = json.loads(world.broadcast(json.dumps(found)))
    if "error" in found:
        raise ValueError(found["error"])
    return list(found["lines"])


def gathered(world: World, text: str) -> list[str]:
    """The text of every rank, on all ranks."""
    data = text.encode()
    assert len(data) <= MAX_BYTES, len(data)
    table = torch.zeros(world.size, MAX_BYTES, dtype=torch.int32)
    table[world.rank, : len(data)] = torch.tensor(list(data), dtype=torch.int32)
    rows = world.sum(table).to(torch.uint8).numpy()
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]
