"""Which run a command means: one given by name, the newest unfinished one, or a new one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_io.parsing import parse_yaml
from training.checkpoint import CONFIG_FILE, RunDirectory
from training.distributed import World
from training.schema import MACHINE_KEYS, NAME_KEYS, RunConfig

CHECKPOINTS = Path("checkpoints")
_MANNERS = "amber brave calm daring eager fair gentle happy jolly keen lively mellow noble proud"
_ANIMALS = "badger crane dolphin falcon gecko heron ibis jackal koala lynx marmot otter puffin wren"


def resolve_run(config: RunConfig, world: World) -> tuple[RunConfig, str]:
    """The configuration with its three names filled in, and why they are these.

    Rank 0 decides. Without names the same command continues the newest unfinished run that has the
    same settings; `new_run=true` starts another.
    """
    named = ""
    if world.is_main:
        named = "\n".join(_names(config, world))
    project, run, path, reason = world.broadcast(named).split("\n")
    update = {"project_name": project, "run_name": run, "checkpoint_path": path}
    return config.model_copy(update=update), reason


def names_in_sweep(config: Mapping[str, Any], job_number: int) -> dict[str, str]:
    """Given names end in the job's number there: no two jobs of a sweep share a folder."""
    given = [key for key in ("run_name", "checkpoint_path") if config.get(key) is not None]
    return {key: f"{config[key]}-{job_number}" for key in given}


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that two runs must share to be the same run; what is not set is left out."""
    left_out = (*MACHINE_KEYS, *NAME_KEYS)
    return {k: v for k, v in config.items() if v is not None and k not in left_out}


def is_finished(run: RunDirectory, epochs: int) -> bool:
    """Whether the run has gone through all its epochs."""
    found = run.checkpoints()
    return bool(found) and found[-1].progress.epoch >= epochs


def named_path(
    *,
    data_path: str,
    project_name: str | None,
    run_name: str | None,
    checkpoint_path: str | None,
) -> Path | None:
    """The folder of a run by the names that a command gives; None where it names no run."""
    if checkpoint_path:
        return Path(checkpoint_path)
    return _project_path(data_path, project_name) / str(run_name) if run_name else None


def _project_path(data_path: str, project_name: str | None) -> Path:
    return CHECKPOINTS / str(project_name or Path(data_path).resolve().name)


def _names(config: RunConfig, world: World) -> tuple[str, str, str, str]:
    project = _project_path(config.data.path, config.project_name).name
    given = named_path(
        data_path=config.data.path,
        project_name=config.project_name,
        run_name=config.run_name,
        checkpoint_path=config.checkpoint_path,
    )
    if given:
        return project, config.run_name or given.name, str(given), "given"
    if not config.new_run:
        found = _newest_run(config, CHECKPOINTS / project, world)
        if found:
            path, kind = found
            reason = f"the newest {kind} run with these settings; new_run=true starts another"
            return project, path.name, str(path), reason
    while True:
        slug = f"{random.choice(_MANNERS.split())}-{random.choice(_ANIMALS.split())}"
        path = CHECKPOINTS / project / f"{config.arch.name}-{slug}-{random.randrange(100):02}"
        if not path.exists():
            return project, path.name, str(path), "a new run; the name was drawn"


def _newest_run(config: RunConfig, project_path: Path, world: World) -> tuple[Path, str] | None:
    """The newest unfinished run of the same settings; else the newest finished one."""
    finished = None
    wanted = comparable(config.model_dump())
    candidates = sorted(
        project_path.glob(f"*/{CONFIG_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True
    )
    for file in candidates:
        try:
            stored = parse_yaml(file.read_text())
        except ValueError:
            continue  # not a run that can be continued
        if not isinstance(stored, dict) or comparable(stored) != wanted:
            continue
        if not is_finished(RunDirectory(file.parent, world), config.epochs):
            return file.parent, "unfinished"
        finished = finished or (file.parent, "finished")
    return finished
