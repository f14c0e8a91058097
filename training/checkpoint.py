"""The run directory: configuration, metrics, and checkpoints that exist whole or not at all.

    <run>/all_config.yaml train_metadata.yaml metrics.jsonl environment.json
    <run>/fsdp2_epoch_1/ fsdp2_step_1500/: model/ ema/ optimizer/ progress.json digests.json
    <run>/fsdp2_best/: the same, where the lowest held-out loss is kept

A checkpoint is written under a name that nothing reads, synced to the disk, and renamed. Where each
node saves on a disk of its own, it has the files of its ranks, and the same records beside them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from data_io.parsing import parse_json
from training.adam_atan2 import AdamATan2
from training.agreement import errors_of_all, on_keepers, on_main
from training.digests import (
    DIGESTS_FILE,
    digest_of,
    read_digests,
    require_digest,
    take_digests,
    write_own_digests,
)
from training.distributed import Disk, World
from training.publishing import drop_replaced, empty_folder, publish, write_atomically
from training.run_lock import RunLock
from training.tensor_store import METADATA_FILE as INDEX_FILE
from training.tensor_store import read_tensors, read_tensors_into, write_tensors

CONFIG_FILE, METADATA_FILE = "all_config.yaml", "train_metadata.yaml"
PROGRESS_FILE = "progress.json"
MODEL, EMA, OPTIMIZER = "model", "ema", "optimizer"
BEST = "fsdp2_best"  # of the lowest held-out loss: no run is continued from it, nothing prunes it
_NAME = re.compile(r"fsdp2_(epoch|step)_(\d+)")  # those that a run is continued from
_TENSOR_FILE = re.compile(r"\w+/__(\d+)_\d+\.distcp")  # by the rank that wrote it


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
    disks: tuple[Disk, ...] = ()  # that it was saved on; none: all ranks saved into one folder

    @property
    def has_ema(self) -> bool:
        return (self.path / EMA).is_dir()

    def verify(self, *folders: str) -> None:
        """Compares the files of `folders` (all by default) with their digests; ValueError."""
        if absent := self.absent_files(*folders):
            raise ValueError(self.told_of_absent(absent))
        for _, damage in self.checked_files(*folders):
            if damage:
                raise ValueError(damage)

    def checked_files(self, *folders: str) -> Iterator[tuple[str, str | None]]:
        """Each file of `folders` (all by default), and what is wrong with it; None: nothing."""
        digests = read_digests(self.path)
        absent = self.absent_files(*folders)
        for folder in folders or (MODEL, EMA, OPTIMIZER):
            listed = {name for name in digests if name.startswith(f"{folder}/")}
            there = {f"{folder}/{file.name}" for file in (self.path / folder).glob("*")}
            for name in sorted(listed | there):
                try:
                    if name in absent:
                        raise ValueError(self.told_of_absent([name]))
                    require_digest(self.path, name, digests)
                    yield name, None
                except (ValueError, OSError) as error:
                    yield name, str(error)

    def absent_files(self, *folders: str) -> list[str]:
        """Files with tensors of `folders` (all by default) that are listed and not here."""
        listed = (each for each in read_digests(self.path) if _TENSOR_FILE.fullmatch(each))
        wanted = folders or (MODEL, EMA, OPTIMIZER)
        here = (each for each in listed if each.partition("/")[0] in wanted)
        return sorted(name for name in here if not (self.path / name).is_file())

    def told_of_absent(self, names: Sequence[str]) -> str:
        """Whose files these are, and what to do."""
        ranks = {int(_TENSOR_FILE.fullmatch(name)[1]) for name in names}  # type: ignore[index]
        owners = [disk for disk in self.disks if ranks & set(disk.ranks)]
        if not owners:
            return f"{self.path / names[0]} is missing; the checkpoint is damaged, use another one"
        there = ", ".join(map(str, owners))
        return (
            f"{self.path} lacks the files that were saved on {there}; copy the {self.path.name} "
            "of that node into it, or bring the node back"
        )

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

        def begin() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            for rest in self.path.glob(".fsdp2_*"):
                shutil.rmtree(rest)
            write_atomically(self.path / CONFIG_FILE, yaml.safe_dump(dict(config)))
            write_atomically(self.path / METADATA_FILE, yaml.safe_dump(dict(metadata)))

        on_keepers(self.world, begin)
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
            if self.world.is_keeper:
                shutil.rmtree(self.path, ignore_errors=True)

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints on this disk, the furthest last; `damaged` tells of others."""
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

    def remove(self, name: str) -> None:
        """Removes a checkpoint from this disk, if it is there."""
        aside = self.path / f".{name}.removed"
        if (self.path / name).exists():
            (self.path / name).rename(aside)  # never half a checkpoint under its own name
            shutil.rmtree(aside)

    def save(
        self,
        name: str,
        state: Mapping[str, Mapping[str, Tensor]],
        progress: Progress,
        log_state: Mapping[str, Any],
    ) -> None:
        """Publishes a checkpoint; every rank calls it. Errors leave older ones as they are."""
        assert _NAME.fullmatch(name) or name == BEST, name
        staging, world = self.path / f".{name}", self.world
        on_keepers(world, lambda: empty_folder(staging))
        for folder, tensors in state.items():
            write_tensors(staging / folder, tensors)
        try:
            write_own_digests(staging, world.rank)
            error = ""
        except OSError as caught:
            error = f"{staging}: {caught}"
        if errors := errors_of_all(world, error):
            raise OSError(errors[0])
        record = {**asdict(progress), "log_state": dict(log_state)}
        record |= {"data": self.data} if self.data else {}
        record |= {"disks": [asdict(disk) for disk in world.disks]} if world.disks else {}
        text = world.broadcast(json.dumps(record, indent=2))
        # Rank 0 alone has written the indices of all files.
        files = [staging / folder / INDEX_FILE for folder in state] if world.disks else []
        indices = [
            on_main(world, lambda f=file: f.read_bytes().decode("latin-1")) for file in files
        ]

        def list_own() -> tuple[str, list[dict[str, str]]]:
            write_atomically(staging / PROGRESS_FILE, text)
            for file, index in zip(files, indices, strict=True):
                write_atomically(file, index.encode("latin-1"))
            return digest_of(staging / PROGRESS_FILE), take_digests(staging)

        listed = on_keepers(world, list_own)
        lists = [each for _, own in listed for each in own]
        if len(lists) != world.size:
            raise OSError(f"{staging}: {len(lists)} of {world.size} ranks say what they wrote")
        digests = {PROGRESS_FILE: listed[0][0]}
        for each in lists:
            digests |= each
        text = json.dumps(digests, indent=2)
        on_keepers(world, lambda: write_atomically(staging / DIGESTS_FILE, text))
        on_keepers(world, lambda: publish(staging, self.path / name))
        # Only now that all have published: until then `parts.recover` may bring the old one back.
        on_keepers(world, lambda: drop_replaced(self.path / name))


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
        disks = (Disk.read(each) for each in record.pop("disks", ()))
        return Checkpoint(path, Progress(**record), log_state, data, tuple(disks))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path / PROGRESS_FILE} cannot be read: {error}") from error


if __name__ == "__main__":  # python -m training.checkpoint verify DIR
    from training.checkpoint_checks import main  # which imports this module

    main()
