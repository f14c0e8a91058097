"""Where a run's weights come from: its own newest checkpoint, or another run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.lora import LoraConfig, is_adapter
from training.adam_atan2 import AdamATan2
from training.adapters import read_start_into, stored_lora
from training.agreement import on_keepers
from training.checkpoint import (
    CONFIG_FILE,
    EMA,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    Progress,
    RunDirectory,
    read_checkpoint,
    training_state,
)
from training.distributed import World
from training.parts import bring_records, first_sound, published, recover, why_unsound
from training.run_lock import LOCK_FILE, require_unlocked
from training.run_names import comparable
from training.run_records import choose_checkpoint, stored_config
from training.schema import RunConfig
from training.tensor_store import read_tensors_into, tensor_shapes

# Machine settings that change the last bits; kernels and threads say so for themselves.
BIT_KEYS = ("micro_batch_size", "deterministic")
# What a run that starts from another one has of its own.
START_KEYS = ("resume_from", "resume_epoch", "resume_best", "weights_only_resume_from_ema")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: at a checkpoint of its own, at one of another run, or at nothing."""

    checkpoint: Checkpoint | None  # of this run: it is continued
    source: Checkpoint | None  # of the run in resume_from
    is_finished: bool
    notes: tuple[str, ...]  # for the user: what differs, what was skipped

    @property
    def progress(self) -> Progress:
        return self.checkpoint.progress if self.checkpoint else Progress()


def agree_on_start(directory: RunDirectory, config: RunConfig) -> Start:
    """`find_start`, once nobody else trains there; the records are with rank 0 then."""
    # Before anything is touched that another run may be writing.
    on_keepers(directory.world, lambda: require_unlocked(directory.path))
    recover(directory)
    start = find_start(directory, config)
    if config.dry_run:
        return start
    return replace(start, notes=(*bring_records(directory), *start.notes))


def find_start(directory: RunDirectory, config: RunConfig) -> Start:
    """The newest whole checkpoint of this very run, verified; else what `resume_from` names.

    Every rank calls it. ValueError when the folder holds another architecture, or something that is
    no run, or a finished run of other settings; a damaged checkpoint is named and the one before it
    is used.
    """
    found = on_keepers(directory.world, lambda: _run_in(directory.path, config))
    stored = next((each for each in found if each is not None), None)
    if stored is None:
        return _start_from(config, [], directory.world)
    wanted = config.model_dump()
    notes = _differences(comparable(stored), comparable(wanted))
    there, damaged = published(directory)
    checkpoint, reasons = first_sound(directory, reversed(there))
    damaged += reasons
    if checkpoint:
        if not (checkpoint.path / OPTIMIZER).is_dir():
            raise ValueError(
                f"{directory.path} holds imported weights and no optimizer state, so there is "
                "nothing to continue; start a run from it: another checkpoint_path, "
                f"resume_from={directory.path} weights_only_resume_from_ema=true"
            )
        _require_same_epochs(stored, config, directory.path)
        _require_same_trained(stored, wanted, directory.path)
        is_finished = checkpoint.progress.epoch >= config.epochs
        if is_finished and notes:
            raise ValueError(
                f"{directory.path} holds a finished run with other settings ({'; '.join(notes)}); "
                "choose another run_name or checkpoint_path"
            )
        skipped = (f"skipped a checkpoint: {reason}" for reason in damaged)
        before, now = ({key: each.get(key) for key in BIT_KEYS} for each in (stored, wanted))
        bits = (f"{each}; the run is no longer bit-equal" for each in _differences(before, now))
        return Start(checkpoint, None, is_finished, (*notes, *bits, *skipped))
    if damaged:
        raise ValueError(
            f"{directory.path} has no checkpoint that can be continued from: {'; '.join(damaged)}"
        )
    if stored.get("resume_from") != config.resume_from:
        raise ValueError(
            f"{directory.path} was to start from resume_from={stored.get('resume_from')} and has "
            f"no checkpoint yet, but now resume_from={config.resume_from}; give what it was, or "
            "another checkpoint_path"
        )
    notes.append("no complete checkpoint yet: starts from the beginning")
    return _start_from(config, notes, directory.world)


def _run_in(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The settings of the run in a folder; ValueError where `config` cannot be a run there."""
    stored = stored_config(folder)
    if stored is None:
        if folder.is_dir() and not all(map(_is_rest, folder.iterdir())):
            raise ValueError(
                f"{folder} holds something, but no run ({CONFIG_FILE} is missing); "
                "choose another checkpoint_path, or empty the folder"
            )
        return None
    if config.new_run:
        raise ValueError(
            f"new_run=true, but {folder} already holds a run; choose another run_name or "
            "checkpoint_path, or leave new_run out to continue it"
        )
    if config.resume_from and Path(config.resume_from).resolve() == folder.resolve():
        raise ValueError(
            f"resume_from={config.resume_from} is this very run; leave resume_from out to continue "
            "it, or give another checkpoint_path to start a new run from it"
        )
    return stored


def load_start(
    start: Start, config: RunConfig, model: nn.Module, optimizer: AdamATan2
) -> dict[str, str]:
    """Loads what the run begins with, in place; what that is, for the summary."""
    if start.checkpoint:
        start.checkpoint.restore(model, optimizer, is_verified=True)
        return {"continued": f"{start.checkpoint.path.name}, step {start.progress.step:,}"}
    if not start.source:
        return {}
    state, source = training_state(model, optimizer), start.source.path
    loras = {"there": stored_lora(stored_config(source.parent) or {}), "here": config.lora}
    if config.weights_only_resume_from_ema:
        read_start_into(source / EMA, state[MODEL], **loras)
        _begin_average(state)
        return {"starts from": f"{source} (EMA weights; a fresh optimizer)"}
    read_start_into(source / MODEL, state[MODEL], **loras)
    taken = ["weights", _take_optimizer(source / OPTIMIZER, state[OPTIMIZER], **loras)]
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    if EMA in state and start.source.has_ema:
        _begin_average(state)  # of adapters that are not there
        averages = {name: tensor for name, tensor in state[EMA].items() if name in trained}
        read_start_into(source / EMA, averages, **loras)
        taken.append("EMA")
    elif EMA in state:
        _begin_average(state)
        taken.append("no EMA is there: it starts from the weights")
    elif start.source.has_ema:
        taken.append("its EMA is left, since ema is null")
    return {"starts from": f"{source} ({', '.join(taken)})"}


def _take_optimizer(
    source: Path, state: dict[str, Tensor], *, there: LoraConfig | None, here: LoraConfig | None
) -> str:
    """Reads what the source kept of this run's optimizer state; what that is.

    What it did not keep begins at zero: first moments (its beta1 was 0), weights that were frozen.
    """
    stored = tensor_shapes(source)
    known = {
        name: tensor
        for name, tensor in state.items()
        if name in stored and (there == here or not is_adapter(name))
    }
    if not known:
        return "a fresh optimizer"
    read_tensors_into(source, known)
    absent = sorted({name.partition(".")[0] for name in set(state) - set(known)})
    return "optimizer state" + f" ({', '.join(absent)} is not in it: from zero)" * bool(absent)


@torch.no_grad()
def _begin_average(state: dict[str, dict[str, Tensor]]) -> None:
    """The average begins as the weights, where one is kept."""
    for name, average in state.get(EMA, {}).items():
        average.copy_(state[MODEL][name])


def _start_from(config: RunConfig, notes: list[str], world: World) -> Start:
    """The start of a new run: at what `resume_from` names, verified, or at nothing."""
    if config.resume_from is None:
        return Start(None, None, False, tuple(notes))
    name, differences = on_keepers(world, lambda: _source(config))[0]
    path = Path(config.resume_from) / name
    wanted = (EMA,) if config.weights_only_resume_from_ema else ()
    if damage := why_unsound(path, world, *wanted):
        raise ValueError(damage)
    return Start(None, read_checkpoint(path), False, (*notes, *differences))


def _source(config: RunConfig) -> tuple[str, list[str]]:
    """The checkpoint that `resume_from` names, and how the settings of its run differ."""
    run = Path(str(config.resume_from))
    stored = stored_config(run)
    if stored is None:
        raise FileNotFoundError(
            f"resume_from={run} is no run directory ({CONFIG_FILE} is missing); give the folder "
            "that holds fsdp2_epoch_N"
        )
    there = stored_lora(stored)
    if there and there.per_cycle and there != config.lora:
        raise ValueError(
            f"resume_from={run} has adapters for each call of a stack, which cannot be merged into "
            f"its weights; give the same lora settings ({there.model_dump()}) to train them on"
        )
    checkpoint = choose_checkpoint(run, epoch=config.resume_epoch, best=config.resume_best)
    if config.weights_only_resume_from_ema and not checkpoint.has_ema:
        raise ValueError(
            f"{checkpoint.path} holds no EMA weights; leave weights_only_resume_from_ema out"
        )
    has_optimizer = (checkpoint.path / OPTIMIZER).is_dir()
    if not has_optimizer and not config.weights_only_resume_from_ema:
        raise ValueError(
            f"{checkpoint.path} holds no optimizer state: its weights were imported; add "
            "weights_only_resume_from_ema=true to begin with a fresh optimizer"
        )
    if not has_optimizer:  # nor does its configuration know how it was trained
        return checkpoint.path.name, []
    before, now = (
        {key: value for key, value in comparable(settings).items() if key not in START_KEYS}
        for settings in (stored, config.model_dump())
    )
    differences = [f"than in {run}: {each}" for each in _differences(before, now)]
    return checkpoint.path.name, differences


def _require_same_epochs(stored: dict[str, Any], config: RunConfig, run: Path) -> None:
    """The schedule of a run follows from its epochs, unless its length was given."""
    before = stored.get("epochs")
    if before == config.epochs or isinstance(config.schedule_steps, int):
        return
    raise ValueError(
        f"epochs={config.epochs}, but {run} was begun with epochs={before}, and its schedule with "
        f"it; leave epochs at {before} to continue it, or train on in another run: new_run=true "
        f"run_name=... resume_from={run}"
    )


def _require_same_trained(stored: dict[str, Any], wanted: dict[str, Any], run: Path) -> None:
    """What is trained has state in every checkpoint, and the rest has none."""
    for key in ("freeze", "lora"):
        if stored.get(key) != wanted[key]:
            raise ValueError(
                f"{key}={wanted[key]}, but {run} was begun with {key}={stored.get(key)}; leave it "
                f"as it was to continue, or start another run from it: run_name=... resume_from="
                f"{run}"
            )


def _is_rest(path: Path) -> bool:
    """Whether a run that was killed before it had written its configuration left this."""
    return path.name == LOCK_FILE or (path.name.startswith(".") and path.suffix == ".writing")


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each setting that is not as it was."""
    stored, wanted = _flat(stored), _flat(wanted)
    keys = dict.fromkeys((*stored, *wanted))
    return [
        f"{key}: was {stored.get(key)}, now {wanted.get(key)}"
        for key in keys
        if stored.get(key) != wanted.get(key)
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted keys, as the command line writes them."""
    flat = {}
    for key, value in settings.items():
        parts = value if isinstance(value, dict) and key in ("arch", "data") else None
        flat |= {key: value} if parts is None else {f"{key}.{k}": v for k, v in parts.items()}
    return flat
