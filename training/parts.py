"""What the disks of a run hold of its checkpoints: each a part, all together the whole.

Where all ranks see one folder, that is the only part. Every rank calls each function here, at the
same time; each disk's keeper looks at its own, and all ranks learn what was found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_io.parsing import parse_json
from training.agreement import on_keepers, on_main
from training.checkpoint import Checkpoint, RunDirectory, read_checkpoint
from training.digests import DIGESTS_FILE, digest_of
from training.distributed import World
from training.environment import ENVIRONMENT_FILE
from training.publishing import publish, replaced, write_atomically


@dataclass(frozen=True, slots=True, order=True)
class Published:
    """A checkpoint that at least one disk has; a later one is greater."""

    step: int
    epoch: int  # an epoch's checkpoint is written after the step's at the same step
    name: str


def published(directory: RunDirectory) -> tuple[list[Published], list[str]]:
    """All of a run, the furthest last, and why of others it cannot be told how far they are."""

    def look() -> tuple[list[tuple[int, int, str]], list[str]]:
        found = [(c.progress.step, c.progress.epoch, c.path.name) for c in directory.checkpoints()]
        return found, directory.damaged()

    looks = on_keepers(directory.world, look)
    return (
        sorted({Published(*each) for found, _ in looks for each in found}),
        [reason for _, damaged in looks for reason in damaged],
    )


def first_sound(
    directory: RunDirectory, candidates: Iterable[Published]
) -> tuple[Checkpoint | None, list[str]]:
    """The first that all disks together hold as it was written, and why those before it are not."""
    reasons = []
    for each in candidates:
        path = directory.path / each.name
        reason = why_unsound(path, directory.world)
        if not reason:
            return read_checkpoint(path), reasons
        reasons.append(reason)
    return None, reasons


def why_unsound(path: Path, world: World, *folders: str) -> str | None:
    """What is wrong with a checkpoint, or `folders` of it, on all disks together; None: nothing."""
    try:
        return _incomplete(path, world, folders) or _damaged(path, world, folders)
    except (ValueError, OSError) as error:  # of one disk, on all ranks
        return str(error)


def _incomplete(path: Path, world: World, folders: tuple[str, ...]) -> str | None:
    lists = on_keepers(world, lambda: _digest_of_list(path))
    if len(set(filter(None, lists))) > 1:
        return f"{path} is not of the same save on all of {_told(world.disks)}"
    absent = on_keepers(world, lambda: _absent_files(path, folders))
    sets = [set(each) for each in absent if each is not None]
    if sets and (nowhere := set.intersection(*sets)):
        told = on_keepers(world, lambda: _told_of_absent(path, sorted(nowhere)))
        return next(filter(None, told))
    lacking = [disk for disk, each in zip(world.disks, lists, strict=False) if not each]
    if lacking:
        return f"{path} is not on {_told(lacking)}; copy {path.parent} there from another node"
    return None


def _damaged(path: Path, world: World, folders: tuple[str, ...]) -> str | None:
    def look() -> str | None:
        checkpoint = read_checkpoint(path)
        absent = checkpoint.absent_files(*folders)
        checked = checkpoint.checked_files(*folders)
        return next((why for name, why in checked if why and name not in absent), None)

    return next(filter(None, on_keepers(world, look)), None)


def remove(directory: RunDirectory, names: Iterable[str]) -> None:
    """Removes checkpoints from all disks, one after the other."""
    for name in names:
        on_keepers(directory.world, lambda each=name: directory.remove(each))


def prune_steps(directory: RunDirectory, keep_last: int | None) -> None:
    """Removes step checkpoints before the last ones (None: keeps all); never epochs' or 0.

    Damaged ones after the last sound one stay beside: that one is never removed.
    """
    if keep_last is None:
        return
    found, _ = published(directory)
    steps = [each for each in found if each.name.startswith("fsdp2_step_") and each.step]
    while len(steps) > keep_last and why_unsound(directory.path / steps[-1].name, directory.world):
        steps.pop()
    remove(directory, [each.name for each in steps[:-keep_last]])


def recover(directory: RunDirectory) -> None:
    """Brings back what was being replaced when the run was killed, unless all had published.

    Where one disk had, the others have it written: they publish it now.
    """
    world, run = directory.world, directory.path
    if world.disks:
        _finish_publishing(directory)
    listed = on_keepers(world, lambda: [path.name for path in run.glob(".fsdp2_*.replaced")])
    for name in sorted({each[1:].removesuffix(".replaced") for own in listed for each in own}):
        target = run / name
        lists = on_keepers(world, lambda path=target: _digest_of_list(path))
        if "" in lists or len(set(lists)) > 1:
            on_keepers(world, lambda path=target: _bring_back(directory, path))


def bring_records(directory: RunDirectory) -> list[str]:
    """Rank 0 keeps the records of a run, and may be on another node than before: it gets them.

    Metrics, samples, the environment: all files beside the checkpoints. What to say of it.
    """
    world, run = directory.world, directory.path
    if not world.disks:
        return []
    sittings = on_keepers(world, lambda: _num_sittings(run))
    if sittings[0] == max(sittings):
        return []
    at = sittings.index(max(sittings))
    is_source = world.rank == world.keepers[at]

    def names() -> list[str]:
        files = [path.name for path in run.glob("[!.]*") if path.is_file()]
        return sorted(files, key=lambda each: each == ENVIRONMENT_FILE)  # which counts, last

    found = on_keepers(world, names)[at]
    for path in (run / name for name in found):

        def read(path: Path = path) -> str:
            return path.read_bytes().decode("latin-1") if is_source else ""

        content = on_keepers(world, read)[at].encode("latin-1")
        on_main(world, lambda path=path, content=content: write_atomically(path, content))
    return [f"records     {len(found)} files of the run are taken from {world.disks[at]}"]


def _num_sittings(run: Path) -> int:
    """How often the run was begun or continued, as far as it is known here."""
    path = run / ENVIRONMENT_FILE
    try:
        return 1 + len(dict(parse_json(path.read_text())).get("earlier", []))
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to choose anew") from None


def _finish_publishing(directory: RunDirectory) -> None:
    """A save that one disk has published and all others have whole, published or aside."""
    world, run = directory.world, directory.path
    listed = on_keepers(world, lambda: [path.name for path in run.glob(".fsdp2_*")])
    for aside in sorted({each for own in listed for each in own if each.count(".") == 1}):
        staging, target = run / aside, run / aside[1:]
        there = on_keepers(world, lambda path=target: _digest_of_list(path))
        written = on_keepers(world, lambda path=staging: _digest_of_list(path))
        pairs = list(zip(there, written, strict=True))
        saves = [each for each in there if each and all(each in pair for pair in pairs)]
        if saves:

            def finish(save: str = saves[0], paths: tuple[Path, Path] = (staging, target)) -> None:
                if _digest_of_list(paths[1]) != save:
                    publish(*paths)

            on_keepers(world, finish)


def _bring_back(directory: RunDirectory, target: Path) -> None:
    if replaced(target).exists():
        directory.remove(target.name)
        replaced(target).rename(target)


def _digest_of_list(path: Path) -> str:
    """Tells one save of a checkpoint from another; "": it is not there."""
    return digest_of(path / DIGESTS_FILE) if (path / DIGESTS_FILE).is_file() else ""


def _absent_files(path: Path, folders: tuple[str, ...]) -> list[str] | None:
    """Files with tensors that are not on this disk; None: nothing of the checkpoint is."""
    return read_checkpoint(path).absent_files(*folders) if path.exists() else None


def _told_of_absent(path: Path, names: list[str]) -> str:
    return read_checkpoint(path).told_of_absent(names) if path.exists() else ""


def _told(disks: Iterable[object]) -> str:
    return ", ".join(map(str, disks))
