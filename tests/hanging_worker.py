"""pretrain.py with one rank that does something else at a step: `sleep`, `stop`, `kill` or `fail`.

    RANK=0 WORLD_SIZE=2 ... MISCHIEF=sleep:1:3:FILE python tests/hanging_worker.py KEY=VALUE ...

Rank 1 does it before step 3, once: FILE exists from then on.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import training.step

PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain.py"
plain_step = training.step.train_step
what, rank, at_step, file = os.environ["MISCHIEF"].split(":")
done, steps = Path(file), 0


def train_step(*arguments: Any) -> Any:
    global steps
    steps += 1
    if os.environ["RANK"] == rank and steps == int(at_step) and not done.exists():
        done.touch()
        misbehave()
    return plain_step(*arguments)


def misbehave() -> None:
    if what == "fail":
        raise RuntimeError("a mistake in the code")
    if what == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[what])


if __name__ == "__main__":
    training.step.train_step = train_step
    sys.argv[0] = str(PRETRAIN)
    runpy.run_path(str(PRETRAIN), run_name="__main__")
