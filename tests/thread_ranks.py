"""Ranks that are threads of the test: what they tell one another, without a process group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from training.distributed import Disk, World

TIMEOUT_S = 30


@dataclass
class Meeting:
    """Where ranks leave what they say until all have heard it."""

    size: int
    said: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size, timeout=TIMEOUT_S)

    def heard(self, rank: int, word: Any) -> list[Any]:
        self.said[rank] = word
        self.barrier.wait()
        words = [self.said[each] for each in range(self.size)]
        self.barrier.wait()
        return words


@dataclass(frozen=True, slots=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self.meeting.heard(self.rank, values)).sum(dim=0)

    def broadcast_bytes(self, content: bytes, source: int = 0) -> bytes:
        return self.meeting.heard(self.rank, content)[source]

    def barrier(self) -> None:
        self.meeting.heard(self.rank, None)


def as_ranks(count: int, act: Callable[[World], Any], disks: tuple[Disk, ...] = ()) -> list[Any]:
    """What each of `count` ranks returns, or the ValueError or OSError that it raises."""
    meeting = Meeting(count)

    def one(rank: int) -> Any:
        try:
            return act(ThreadWorld(rank, count, torch.device("cpu"), disks, meeting))
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
