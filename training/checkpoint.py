"""The run directory: configuration, metrics, and checkpoints that exist whole or not at all.

    <run>/all_config.yaml train_metadata.yaml metrics.jsonl environment.json
    <run>/fsdp2_epoch_1/ fsdp2_step_1500/: model/ ema/ optimizer/ progress.json digests.json
    <run>/fsdp2_best/: the same, where the lowest held-out loss is kept

A checkpoint is written under a name that nothing reads, synced to the disk, and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from data_io.parsing import parse_json
from training.adam_atan2 import AdamATan2
from training.digests import (
    DIGESTS_FILE,
    merge_digests,
    read_digests,
    require_digest,
    write_own_digests,
)
from training.distributed import World
from training.run_lock import RunLock
from training.tensor_store import read_tensors, read_tensors_into, write_tensors

CONFIG_FILE, METADATA_FILE = "all_config.yaml", "train_metadata.yaml"
PROGRESS_FILE = "progress.json"
MODEL, EMA, OPTIMIZER = "model", "ema", "optimizer"
BEST = "fsdp2_best"  # of the lowest held-out loss: no run is continued from it, nothing prunes it
_NAME = re.compile(r"fsdp2_(epoch|step)_(\d+)")  # those that a run is continued from


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; moves only with the batch just stepped."""

    epoch: int = 0  # epochs done
    cursor: int = 0  # examples of the current epoch consumed
    step: int = 0
    tokens: int = 0  # real tokens of all ranks, without padding


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    progress: Progress
    log_state: Mapping[str, Any]  # what the logger has added up and not yet written
    data: str | None = None  # fingerprint of the data that the progress is in

    @property
    def has_ema(self) -> bool:
        return (self.path / EMA).is_dir()

    def verify(self, *folders: str) -> None:
        """Compares the files of `folders` (all by default) with their digests; ValueError."""
        for _, damage in self.checked_files(*folders):
            if damage:
                raise ValueError(damage)

    def is_sound(self) -> bool:
        """Whether every file is as it was written."""
        try:
            self.verify()
        except (ValueError, OSError):
            return False
        return True

    def checked_files(self, *folders: str) -> Iterator[tuple[str, str | None]]:
        """Each file of `folders` (all by default), and what is wrong with it; None: nothing."""
        digests = read_digests(self.path)
        for folder in folders or (MODEL, EMA, OPTIMIZER):
            listed = {name for name in digests if name.startswith(f"{folder}/")}
            there = {f"{folder}/{file.name}" for file in (self.path / folder).glob("*")}
            for name in sorted(listed | there):
                try:
                    require_digest(self.path, name, digests)
                    yield name, None
                except (ValueError, OSError) as error:
                    yield name, str(error)

    def restore(self, model: nn.Module, optimizer: AdamATan2, *, is_verified: bool = False) -> None:
        """Loads weights and optimizer state in place, whatever world size they were saved at."""
        if not is_verified:
            self.verify()
        state = training_state(model, optimizer)
        for folder, tensors in state.items():
            read_tensors_into(self.path / folder, tensors)

    def load_weights(self, *, use_ema: bool) -> dict[str, Tensor]:
        """The weights alone, on CPU; ValueError where an average is asked for and none was kept."""
        folder = EMA if use_ema else MODEL
        if use_ema and not self.has_ema:
            raise ValueError(f"{self.path} holds no EMA weights; load the raw ones instead")
        self.verify(folder)
        return read_tensors(self.path / folder)


def training_state(model: nn.Module, optimizer: AdamATan2) -> dict[str, dict[str, Tensor]]:
    """All tensors of a training run by folder and name: the live ones, not copies.

    The average of a weight that is not trained is that weight.
    """
    params = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    untrained = {name: param for name, param in params.items() if not param.requires_grad}
    state: dict[str, dict[str, Tensor]] = {MODEL: {**params, **buffers}, OPTIMIZER: {}}
    for name, param in params.items():
        for kind, tensor in optimizer.state.get(param, {}).items():
            if kind == "param_ema":
                state.setdefault(EMA, untrained | buffers)[name] = tensor
            else:
                state[OPTIMIZER][f"{kind}.{name}"] = tensor
    return {
        folder: {name: tensor.detach() for name, tensor in tensors.items()}
        for folder, tensors in state.items()
    }


class RunDirectory:
    """Where one run keeps everything."""

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self.lock = RunLock(path, world)  # entered by who trains
        self.data: str | None = None  # fingerprint, for the checkpoints

    def create(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
        """Takes the lock, writes configuration and data record, and clears half-saved rests.

        Returns what is to be said of the lock.
        """
        self.world.barrier()  # other ranks may still be looking at what the folder holds
        notes = self.lock.take()
        if self.world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            for rest in self.path.glob(".fsdp2_*"):
                shutil.rmtree(rest)
            write_atomically(self.path / CONFIG_FILE, yaml.safe_dump(dict(config)))
            write_atomically(self.path / METADATA_FILE, yaml.safe_dump(dict(metadata)))
        self.world.barrier()
        return notes

    def aside(self) -> RunDirectory:
        """A directory on the same disk for what is not kept: see `discarded`."""
        home = next(parent for parent in self.path.absolute().parents if parent.is_dir())
        return RunDirectory(home / f".{self.path.name}.dry_run", self.world)

    @contextmanager
    def discarded(self) -> Iterator[None]:
        """Removes the directory afterwards, however it ends."""
        try:
            yield
            self.world.barrier()  # others may still be looking into it
        finally:
            if self.world.is_main:
                shutil.rmtree(self.path, ignore_errors=True)

    def recover(self) -> None:
        """Brings a checkpoint back that was being replaced when the run was killed."""
        for replaced in self.path.glob(".fsdp2_*.replaced"):
            target = self.path / replaced.name[1:].removesuffix(".replaced")
            if not target.exists():
                replaced.rename(target)

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, the furthest last; `damaged` tells of those left out."""
        found = [each for each in self._read() if isinstance(each, Checkpoint)]
        # An epoch's checkpoint is written after the step's at the same step.
        return sorted(found, key=lambda c: (c.progress.step, c.progress.epoch))

    def damaged(self) -> list[str]:
        """Why published checkpoints cannot be told how far they are."""
        return [str(each) for each in self._read() if isinstance(each, ValueError)]

    def _read(self) -> Iterator[Checkpoint | ValueError]:
        for path in sorted(self.path.glob("fsdp2_*")):
            if _NAME.fullmatch(path.name):
                try:
                    yield read_checkpoint(path)
                except (ValueError, FileNotFoundError) as error:
                    yield ValueError(str(error))

    def prune_steps(self, keep_last: int | None) -> None:
        """Removes step checkpoints before the last ones (None: keeps all); never epochs' or 0.

        Damaged ones after the last sound one stay beside: that one is never removed.
        """
        if keep_last is None:
            return
        if self.world.is_main:
            steps = [c for c in self.checkpoints() if c.path.name.startswith("fsdp2_step_")]
            steps = [c for c in steps if c.progress.step]
            while len(steps) > keep_last and not steps[-1].is_sound():
                steps.pop()
            for checkpoint in steps[:-keep_last]:
                aside = self.path / f".{checkpoint.path.name}.removed"
                checkpoint.path.rename(aside)  # never half a checkpoint under its own name
                shutil.rmtree(aside)
        self.world.barrier()

    def save(
        self,
        name: str,
        state: Mapping[str, Mapping[str, Tensor]],
        progress: Progress,
        log_state: Mapping[str, Any],
    ) -> None:
        """Publishes a checkpoint; every rank calls it. Errors leave older ones as they are."""
        assert _NAME.fullmatch(name) or name == BEST, name
        staging = self.path / f".{name}"
        if self.world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.world.barrier()
        for folder, tensors in state.items():
            write_tensors(staging / folder, tensors)
        write_own_digests(staging, self.world.rank)
        self.world.barrier()
        if self.world.is_main:
            record = {**asdict(progress), "log_state": dict(log_state)}
            record |= {"data": self.data} if self.data else {}
            write_atomically(staging / PROGRESS_FILE, json.dumps(record, indent=2))
            write_atomically(staging / DIGESTS_FILE, merge_digests(staging, PROGRESS_FILE))
            _publish(staging, self.path / name)
        self.world.barrier()


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder; ValueError or FileNotFoundError where there is none, whole.

    Its tensors are not looked at yet.
    """
    if not (path / DIGESTS_FILE).is_file():
        raise FileNotFoundError(
            f"{path} is no complete checkpoint ({DIGESTS_FILE} is missing): it was not published, "
            "or is not one of ours"
        )
    require_digest(path, PROGRESS_FILE, read_digests(path))
    try:
        record = parse_json((path / PROGRESS_FILE).read_text())
        log_state, data = record.pop("log_state"), record.pop("data", None)
        return Checkpoint(path, Progress(**record), log_state, data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / PROGRESS_FILE} cannot be read: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _publish(staging: Path, target: Path) -> None:
    for folder in (*(path for path in staging.iterdir() if path.is_dir()), staging):
        _sync_folder(folder)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":  # python -m training.checkpoint verify DIR
    from training.checkpoint_checks import main  # which imports this module

    main()
