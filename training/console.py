"""What a command says on the terminal, and how it ends."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from training.checkpoint import RunDirectory
from training.distributed import World


def say(world: World, *lines: str) -> None:
    """Prints on rank 0."""
    if world.is_main and lines:
        print(*lines, sep="\n", flush=True)


def refuse(message: str) -> NoReturn:
    """Bad input: one message from each node, and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(20)  # rank 0 says it and ends all, unless it is this process alone that fails
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def give_up(directory: RunDirectory, message: str) -> NoReturn:
    """A run that went wrong: what happened, what is left, what to try; exit code 1."""
    found = directory.checkpoints()
    left = f"the newest checkpoint is {found[-1].path}" if found else "there is no checkpoint yet"
    print(
        f"error: {message}. The optimizer has not seen it; {left}. Lower lr or lengthen "
        "lr_warmup_steps, and look at these examples",
        file=sys.stderr,
    )
    sys.exit(1)
