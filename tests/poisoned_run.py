"""pretrain.py with batches that go wrong, for tests/test_guards.py, as a command of its own.

    POISON="loss@120 gradient@200" python tests/poisoned_run.py KEY=VALUE ...

A batch is named by its `next_cursor`. On the last rank its loss becomes NaN, 50 times what it was
(spike), or an element of its gradient becomes infinite.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import training.step
from models.batch import PackedBatch
from models.language_model import LanguageModel
from models.loss import StepSums

FACTORS = {"loss": float("nan"), "spike": 50.0, "gradient": 1.0}
POISONS = dict(word.split("@")[::-1] for word in os.environ.get("POISON", "").split())
accumulate_gradients = training.step.accumulate_gradients


def poisoned(
    model: LanguageModel,
    micro_batches: Sequence[PackedBatch],
    divisor: float,
    backprop_steps: int | None,
) -> StepSums:
    """`accumulate_gradients`, gone wrong where POISON says so."""
    sums = accumulate_gradients(model, micro_batches, divisor, backprop_steps)
    kind = POISONS.get(str(micro_batches[-1].next_cursor))
    is_last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))
    if kind is None or not is_last:
        return sums
    if kind == "gradient":
        assert model.lm_head.weight.grad is not None
        model.lm_head.weight.grad[3, 3] = float("inf")
    return replace(sums, loss=sums.loss * FACTORS[kind])


if __name__ == "__main__":
    training.step.accumulate_gradients = poisoned
    pretrain = Path(__file__).resolve().parents[1] / "pretrain.py"
    sys.argv[0] = str(pretrain)
    runpy.run_path(str(pretrain), run_name="__main__")
