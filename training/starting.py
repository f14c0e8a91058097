"""Where a run's weights come from: its own newest checkpoint, or another run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import nn

from data_io.sampled_format import SampledData, TokenizerInfo
from training.adam_atan2 import AdamATan2
from training.checkpoint import (
    CONFIG_FILE,
    EMA,
    METADATA_FILE,
    Checkpoint,
    Progress,
    RunDirectory,
    read_checkpoint,
    training_state,
)
from training.distributed import World
from training.run_names import comparable
from training.schema import RunConfig
from training.tensor_store import read_tensors_into

# Settings of nets that say how far gradients reach: the same weights fit whatever they are.
GRADIENT_REACH = {
    *("bp_warmup_ratio", "bp_min_steps", "bp_max_steps"),
    *("H_bp_steps", "L_bp_steps", "L_bp_cycles", "bp_cycles"),
}


class TrainMetadata(BaseModel):
    """train_metadata.yaml: what a run knows of its data."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    max_seq_len: PositiveInt  # of the model: already without the shift
    vocab_size: PositiveInt  # of the model: already rounded up
    total_length: NonNegativeInt
    tokenizer_info: TokenizerInfo


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


def agree_on_start(directory: RunDirectory, config: RunConfig, world: World) -> Start:
    """`find_start` on rank 0, for all ranks: they must not look while another one writes."""
    found: dict[str, Any] = {}
    if world.is_main:
        try:
            directory.recover()
            start = find_start(directory, config)
            found = {
                "checkpoint": str(start.checkpoint.path) if start.checkpoint else None,
                "source": str(start.source.path) if start.source else None,
                "is_finished": start.is_finished,
                "notes": start.notes,
            }
        except (ValueError, OSError) as error:
            found = {"error": str(error)}
    found = json.loads(world.broadcast(json.dumps(found)))
    if "error" in found:
        raise ValueError(found["error"])
    return Start(
        checkpoint=read_checkpoint(Path(found["checkpoint"])) if found["checkpoint"] else None,
        source=read_checkpoint(Path(found["source"])) if found["source"] else None,
        is_finished=found["is_finished"],
        notes=tuple(found["notes"]),
    )


def find_start(directory: RunDirectory, config: RunConfig) -> Start:
    """The newest whole checkpoint of this very run, verified; else what `resume_from` names.

    ValueError when the folder holds another architecture, or something that is no run, or a
    finished run of other settings; a damaged checkpoint is named and the one before it is used.
    """
    stored = stored_config(directory.path)
    if stored is None:
        if directory.path.is_dir() and any(directory.path.iterdir()):
            raise ValueError(
                f"{directory.path} holds something, but no run ({CONFIG_FILE} is missing); "
                "choose another checkpoint_path, or empty the folder"
            )
        return Start(None, _find_source(config), False, ())
    wanted = config.model_dump()
    _require_same_arch(stored, wanted, directory.path)
    if config.new_run:
        raise ValueError(
            f"new_run=true, but {directory.path} already holds a run; choose another run_name or "
            "checkpoint_path, or leave new_run out to continue it"
        )
    notes = _differences(comparable(stored), comparable(wanted))
    damaged = directory.damaged()
    for checkpoint in reversed(directory.checkpoints()):
        try:
            checkpoint.verify()
        except (ValueError, OSError) as error:
            damaged.append(str(error))
            continue
        is_finished = checkpoint.progress.epoch >= config.epochs
        if is_finished and notes:
            raise ValueError(
                f"{directory.path} holds a finished run with other settings ({'; '.join(notes)}); "
                "choose another run_name or checkpoint_path"
            )
        skipped = (f"skipped a checkpoint: {reason}" for reason in damaged)
        return Start(checkpoint, None, is_finished, (*notes, *skipped))
    if damaged:
        raise ValueError(
            f"{directory.path} has no checkpoint that can be continued from: {'; '.join(damaged)}"
        )
    notes.append("no complete checkpoint yet: starts from the beginning")
    return Start(None, _find_source(config), False, tuple(notes))


def load_start(
    start: Start, config: RunConfig, model: nn.Module, optimizer: AdamATan2
) -> dict[str, str]:
    """Loads what the run begins with, in place; what that is, for the summary."""
    if start.checkpoint:
        start.checkpoint.restore(model, optimizer, is_verified=True)
        return {"continued": f"{start.checkpoint.path.name}, step {start.progress.step:,}"}
    if not start.source:
        return {}
    if not config.weights_only_resume_from_ema:
        start.source.restore(model, optimizer, is_verified=True)
        return {"starts from": f"{start.source.path} (weights, optimizer state)"}
    state = training_state(model, optimizer)
    read_tensors_into(start.source.path / EMA, state["model"])
    with torch.no_grad():
        for name, average in state.get(EMA, {}).items():
            average.copy_(state["model"][name])
    return {"starts from": f"{start.source.path} (EMA weights)"}


def _find_source(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that `resume_from` names, verified."""
    if config.resume_from is None:
        return None
    run = Path(config.resume_from)
    stored = stored_config(run)
    if stored is None:
        raise FileNotFoundError(
            f"resume_from={run} is no run directory ({CONFIG_FILE} is missing); give the folder "
            "that holds fsdp2_epoch_N"
        )
    _require_same_arch(stored, config.model_dump(), run)
    checkpoint = choose_checkpoint(run, epoch=config.resume_epoch)
    if config.weights_only_resume_from_ema and not checkpoint.has_ema:
        raise ValueError(
            f"{checkpoint.path} holds no EMA weights; leave weights_only_resume_from_ema out"
        )
    checkpoint.verify(*((EMA,) if config.weights_only_resume_from_ema else ()))
    return checkpoint


def fingerprint_of(data: SampledData, epochs: int) -> str:
    """What tells the data of a run apart, and over how many epochs it was taken."""
    return f"{epochs}:{data.fingerprint(epochs)}"


def require_same_data(recorded: str | None, data: SampledData, config: RunConfig) -> None:
    """ValueError where a run would be continued on other data than it began with."""
    if recorded is None or config.new_run:
        return
    epochs = min(int(recorded.partition(":")[0]), data.num_epochs)
    if fingerprint_of(data, epochs) != recorded:
        raise ValueError(
            f"the data in {config.data.path} is not what {config.checkpoint_path} was trained on "
            "(other files or other content), so its position in it means nothing; bring the data "
            "back, or start another run with another run_name"
        )


def choose_checkpoint(
    run: Path, *, epoch: int | None = None, step: int | None = None
) -> Checkpoint:
    """A run's checkpoint: that of an epoch or a step, else the newest complete one."""
    if epoch is not None:
        return read_checkpoint(run / f"fsdp2_epoch_{epoch}")
    if step is not None:
        return read_checkpoint(run / f"fsdp2_step_{step}")
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    directory = RunDirectory(run, alone)
    if damaged := directory.damaged():
        raise ValueError(f"{damaged[0]}; delete it, or name another by its epoch or step")
    found = directory.checkpoints()
    if not found:
        raise FileNotFoundError(
            f"{run} holds no complete checkpoint (fsdp2_epoch_N or fsdp2_step_N); train it first, "
            "or give another folder"
        )
    return found[-1]


def stored_config(run: Path) -> dict[str, Any] | None:
    """The configuration in a run directory; None where there is none."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("arch"), dict):
        raise ValueError(f"{path} holds no run's configuration; it has no arch section")
    return stored


def stored_metadata(run: Path) -> TrainMetadata:
    """The data record in a run directory."""
    path = run / METADATA_FILE
    try:
        return TrainMetadata.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: the folder is no whole run directory"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no record of training data: {error}") from None


def _require_same_arch(stored: dict[str, Any], wanted: dict[str, Any], run: Path) -> None:
    before, now = (
        {key: value for key, value in config["arch"].items() if key not in GRADIENT_REACH}
        for config in (stored, wanted)
    )
    differences = _differences(before, now)
    if differences:
        raise ValueError(
            f"{run} holds another architecture than the one asked for: "
            f"{'; '.join(differences)}; give the same arch settings, or another checkpoint_path"
        )


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
