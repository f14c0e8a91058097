"""Runs set up and trained by the functions of pretrain.py, with a record of what each step did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from run_cases import whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import pretrain
from models.batch import PackedBatch
from models.hrm import HRMConfig
from models.language_model import LanguageModel
from models.loss import StepSums
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress
from training.distributed import World
from training.export_format import arch_from_reference
from training.schema import RunConfig
from training.step import train_step
from training.step_check import StepCheck

BACKPROP_STEPS = (1, 2, 5)  # of HRM in `train_rows`: the head alone, all but the embedding, all


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: what it was computed from, and what came of it."""

    micro_batches: Sequence[PackedBatch]  # of this rank
    divisor: float
    backprop_steps: int | None
    lr: float
    gradients: dict[str, Tensor]  # reduced over ranks, whole; those that are None left out
    sums: StepSums


class _EnoughError(Exception):
    pass


def golden_run(
    case: Mapping[str, Any], folder: Path, checkpoint_path: Path, world: World
) -> tuple[pretrain.Run, Progress]:
    """The run of a golden case as `python pretrain.py` would set it up."""
    settings = {
        **case["config"],
        "arch": arch_from_reference(case["config"]["arch"]),
        "data": {**case["config"]["data"], "path": str(folder / case["config"]["data"]["path"])},
        "checkpoint_path": str(checkpoint_path),
    }
    chosen = {"schedule_steps": "published", "device": "cpu", "linear": "mkl", "data_workers": 0}
    config = RunConfig(**settings, **chosen)
    prepared = pretrain.prepare(config, [], world)
    assert prepared is not None
    return pretrain.build(prepared), prepared.start.progress


def set_weights(model: LanguageModel, optimizer: AdamATan2, weights: Mapping[str, Tensor]) -> None:
    """Gives a run, sharded or not, other weights to start from, by our names and whole."""
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(model, dict(weights), options=options)
    for param in model.parameters():
        optimizer.state[param]["param_ema"].copy_(param.detach())


def recording(
    take_step: Callable[..., StepSums], records: list[StepRecord], num_steps: int | None = None
) -> Callable[..., StepSums]:
    """`train_step` that also adds to `records`, and ends the run after `num_steps`."""

    def recorded(
        model: LanguageModel,
        optimizer: AdamATan2,
        micro_batches: Sequence[PackedBatch],
        divisor: float,
        backprop_steps: int | None,
        check: StepCheck,
    ) -> StepSums:
        if len(records) == num_steps:
            raise _EnoughError
        gradients: dict[str, Tensor] = {}

        def keep_gradients(*_: Any) -> None:
            for name, param in model.named_parameters():
                if param.grad is not None:
                    gradients[name] = whole(param.grad)

        hook = optimizer.register_step_pre_hook(keep_gradients)
        sums = take_step(model, optimizer, micro_batches, divisor, backprop_steps, check)
        hook.remove()
        lr = optimizer.param_groups[0]["lr"]
        records.append(StepRecord(micro_batches, divisor, backprop_steps, lr, gradients, sums))
        return sums

    return recorded


def train_recorded(
    run: pretrain.Run, progress: Progress, num_steps: int | None = None
) -> list[StepRecord]:
    """Trains as pretrain.py does, for `num_steps` steps or to the end."""
    records: list[StepRecord] = []
    recorded = recording(train_step, records, num_steps)
    with mock.patch.object(pretrain, "train_step", recorded), suppress(_EnoughError):
        pretrain.train(run, progress)
    run.logger.close()
    return records


def train_rows(
    model: LanguageModel,
    optimizer: AdamATan2,
    rows: Sequence[Sequence[PackedBatch]],
    world: World,
) -> list[StepRecord]:
    """One `train_step` for each of this rank's rows, given as micro-batches; HRM's gradient
    reaches ever deeper, at first only the head."""
    records: list[StepRecord] = []
    recorded = recording(train_step, records)
    is_hrm = isinstance(model.config, HRMConfig)
    for micro_batches, backprop_steps in zip(rows, BACKPROP_STEPS, strict=True):
        divisor = micro_batches[-1].global_num_scored / world.size
        steps = backprop_steps if is_hrm else None
        recorded(model, optimizer, micro_batches, divisor, steps, StepCheck(world))
    return records
