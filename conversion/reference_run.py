"""What a run directory of the original trainer says of its run, in our records.

Reads all_config.yaml and train_metadata.yaml; follows no path that stands in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_io.parsing import parse_yaml
from data_io.sampled_format import TokenizerInfo
from models.transformer import NetConfig
from training.checkpoint import CONFIG_FILE, METADATA_FILE
from training.command_line import explain
from training.export_format import REFERENCE_NETS, arch_from_reference
from training.run_records import TrainMetadata, stored_config
from training.schema import DataConfig, RunConfig, net_names

# What the original's run started from lies elsewhere, and has been taken already.
_STARTED_FROM = ("resume_from", "resume_epoch", "weights_only_resume_from_ema")


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """An original run by our records."""

    config: RunConfig
    metadata: TrainMetadata
    notes: tuple[str, ...]  # what has no place here


def read_reference_run(run: Path, out_dir: Path) -> ReferenceRun:
    """ValueError or FileNotFoundError where `run` is none, or has a net that is not known here.

    The record is of a run in `out_dir`.
    """
    stored = stored_config(run)
    if stored is None:
        raise FileNotFoundError(
            f"{run} is no run directory ({CONFIG_FILE} is missing); give the folder that holds "
            "fsdp2_epoch_N"
        )
    config, config_notes = _config_of(stored, run / CONFIG_FILE, out_dir)
    metadata, metadata_notes = _metadata_of(run / METADATA_FILE)
    return ReferenceRun(config, metadata, (*config_notes, *metadata_notes))


def _config_of(stored: Mapping[str, Any], path: Path, out_dir: Path) -> tuple[RunConfig, list[str]]:
    notes = []
    settings = {**stored, "checkpoint_path": str(out_dir), "run_name": out_dir.name}
    # The original's schedule is as long as it estimates, not as many steps as there are.
    settings.setdefault("schedule_steps", "published")
    for key in _STARTED_FROM:
        if settings.pop(key, None):
            notes.append(f"{key}={stored[key]} is left out: it has happened already")
    data = settings.get("data")
    if isinstance(data, Mapping):
        settings["data"] = _known(data, DataConfig.model_fields, notes, "data.")
    settings = _known(settings, RunConfig.model_fields, notes)
    settings["arch"] = _arch_of(settings["arch"], path)
    try:
        return RunConfig(**settings), notes
    except ValidationError as error:
        told = explain(error).replace("\n", "; ")
        raise ValueError(f"{path} has settings that are not known here: {told}") from None


def _arch_of(settings: Mapping[str, Any], path: Path) -> NetConfig:
    """Nothing is left out here: a setting that is not known may change what the net computes."""
    name = settings.get("name")
    if name not in REFERENCE_NETS and name not in net_names():
        known = ", ".join((*REFERENCE_NETS, *net_names()))
        raise ValueError(f"{path}: arch.name={name} is no net that is known here; known: {known}")
    try:
        return arch_from_reference(settings)
    except ValidationError as error:
        found = error.errors(include_url=False)
        told = "; ".join(
            f"arch.{'.'.join(map(str, each['loc'][1:]))}={each['input']!r}: {each['msg']}"
            if each["loc"][1:]
            else f"arch: {each['msg']}"
            for each in found
        )
        raise ValueError(f"{path} has a net that is not known here: {told}") from None


def _metadata_of(path: Path) -> tuple[TrainMetadata, list[str]]:
    notes: list[str] = []
    try:
        stored = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the run directory is not whole") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if isinstance(stored, dict) and isinstance(stored.get("tokenizer_info"), dict):
        info = stored["tokenizer_info"]
        stored["tokenizer_info"] = _known(
            info, TokenizerInfo.model_fields, notes, "tokenizer_info."
        )
    try:
        return TrainMetadata.model_validate(stored), notes
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path} is no record of training data: {told}") from None


def _known(
    settings: Mapping[str, Any], fields: Mapping[str, Any], notes: list[str], prefix: str = ""
) -> dict[str, Any]:
    """The settings that we have too; the others are noted."""
    for key in settings:
        if key not in fields:
            notes.append(f"{prefix}{key}={settings[key]!r} is left out: nothing here reads it")
    return {key: value for key, value in settings.items() if key in fields}
