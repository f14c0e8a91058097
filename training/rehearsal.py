"""What a dry run found: how long steps and checkpoints take, and how much memory they need."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from training.host_state import local_part

GIB = 2**30


class Rehearsal:
    """Seconds of each part of a dry run, and what they say of the whole run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measures what is done inside."""
        started_at = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - started_at

    def lines(self, steps_left: int, saved: int) -> list[str]:
        """For the user: steps were the heaviest ones, the first of them with its warm-up.

        `saved`: bytes of the checkpoint.
        """
        parts = ", ".join(f"{part} {elapsed_s:.2f} s" for part, elapsed_s in self.seconds.items())
        step_s = [elapsed_s for part, elapsed_s in self.seconds.items() if part.startswith("step")]
        return [
            f"dry run     {parts}",
            f"steps       {steps_left:,} like the last one would take "
            f"{step_s[-1] * steps_left / 3600:,.2g} h",
            f"checkpoint  {saved / 1e6:,.1f} MB, read back as it was saved",
            f"memory      {peak_bytes(self.device) / GIB:.2f} GiB at the peak, of this process",
        ]


def bytes_in(folder: Path) -> int:
    """Of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest(state: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Of this rank's parts of all tensors, bit for bit."""
    found = hashlib.blake2b()
    for folder, tensors in state.items():
        for name, tensor in tensors.items():
            found.update(f"{folder}/{name}".encode())
            found.update(local_part(tensor).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def peak_bytes(device: torch.device) -> int:
    """Of the allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
