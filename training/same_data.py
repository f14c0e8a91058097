"""A run goes on with the data that it began with, and all its ranks read the same."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_io.prompt_format import find_tokenizer, token_differences
from data_io.sampled_format import SampledData
from training.agreement import gathered, on_main
from training.checkpoint import Checkpoint, Progress
from training.distributed import World
from training.run_records import fingerprint_of, tokens_of_run
from training.schema import RunConfig

SHOWN_FILES = 3  # of those that differ


def data_record(data: SampledData, epochs: int) -> dict[str, Any]:
    """What environment.json keeps of the data, to tell later what of it is another."""
    return {"data": fingerprint_of(data, epochs), "data_files": data.file_fingerprints(epochs)}


def agree_on_data(
    run: Path,
    data: SampledData,
    config: RunConfig,
    *,
    recorded: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    world: World,
) -> list[str]:
    """ValueError on every rank where one reads other data than rank 0, or where a run would go on
    with other data than `checkpoint` was made on (else: than `recorded` by `data_record`).

    Returns what to say.
    """
    _require_one_data(data, config, world)
    if checkpoint and checkpoint.data and checkpoint.data != recorded.get("data"):
        recorded = {"data": checkpoint.data}
    progress = checkpoint.progress if checkpoint else Progress()
    return on_main(world, lambda: _continued_on(run, data, config, recorded, progress))


def _require_one_data(data: SampledData, config: RunConfig, world: World) -> None:
    if world.size == 1:
        return
    epochs = min(config.epochs, data.num_epochs)
    here = {**data_record(data, epochs), "epochs": data.num_epochs}
    first = json.loads(world.broadcast(json.dumps(here)))
    changed = ""
    if here != first:
        changed = _changed_files(first["data_files"], here["data_files"]) or "its epochs differ"
    found = gathered(world, f"{socket.gethostname()[:200]}\n{changed[:700]}")
    others = [(rank, *each.partition("\n")[::2]) for rank, each in enumerate(found)]
    told = [f"rank {rank} on {host} ({what})" for rank, host, what in others if what]
    if told:
        more = f" and {len(told) - 8} more" * (len(told) > 8)
        raise ValueError(
            f"{config.data.path} is not the same on all ranks: other data than rank 0 on "
            f"{others[0][1]} have {', '.join(told[:8])}{more}; copy it there once more"
        )


def _continued_on(
    run: Path, data: SampledData, config: RunConfig, recorded: Mapping[str, Any], at: Progress
) -> list[str]:
    differences = _changed_tokens(run, data)
    if recorded.get("data"):
        epochs = min(int(recorded["data"].partition(":")[0]), data.num_epochs)
        if fingerprint_of(data, epochs) != recorded["data"]:
            files = data.file_fingerprints(epochs)
            changed = _changed_files(recorded.get("data_files") or {}, files)
            differences.append(changed or "other files or other content")
    if not differences:
        return []
    told = "; ".join(differences)
    if config.allow_other_data and at.epoch < config.epochs:
        data.require_epochs(config.epochs)
        num_examples = len(data.epoch(at.epoch))
        if at.cursor > num_examples:
            raise ValueError(
                f"allow_other_data=true, but {run} stands at example {at.cursor:,} of an epoch, "
                f"and epoch {at.epoch} in {config.data.path} has {num_examples:,}; give larger "
                "data, or start another run with another run_name"
            )
        return [f"data        other than before, as allow_other_data=true admits: {told}"]
    raise ValueError(
        f"the data in {config.data.path} is not what {run} was trained on ({told}), so its "
        "position in it means nothing; bring the data back, start another run with another "
        "run_name, or go on at the same position of this data: allow_other_data=true"
    )


def _changed_tokens(run: Path, data: SampledData) -> list[str]:
    """What the ids of the data mean otherwise than when the run began."""
    try:
        info, there = tokens_of_run(run)
    except (ValueError, FileNotFoundError):  # there is no run yet, or the record is made anew
        return []
    data_info = data.metadata.tokenizer_info
    before, now = find_tokenizer(info, there), find_tokenizer(data_info, data.folder)
    same_info = data_info.model_copy(update={"tokenizer_path": info.tokenizer_path}) == info
    if same_info and (not before or not now or before.read_bytes() == now.read_bytes()):
        return []
    return token_differences((data_info, data.folder), (info, there))


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names files that are not as they were; "" where it is not known what they were."""
    if not before:
        return ""
    names: Iterable[str] = dict.fromkeys((*before, *now))
    changed = [
        name + " is new" * (name not in before) + " is gone" * (name not in now)
        for name in names
        if before.get(name) != now.get(name)
    ]
    more = f" and {len(changed) - SHOWN_FILES} more" * (len(changed) > SHOWN_FILES)
    return f"changed: {', '.join(changed[:SHOWN_FILES])}{more}" if changed else ""
