"""What a run directory says of its run, for whoever continues it, starts from it or asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from data_io.parsing import parse_yaml
from data_io.prompt_format import TOKENIZER_FILE, token_differences, vocabulary
from data_io.sampled_format import SampledData, TokenizerInfo
from training.checkpoint import (
    BEST,
    CONFIG_FILE,
    METADATA_FILE,
    Checkpoint,
    RunDirectory,
    read_checkpoint,
)
from training.distributed import World


class TrainMetadata(BaseModel):
    """train_metadata.yaml: what a run knows of its data."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    max_seq_len: PositiveInt  # of the model: already without the shift
    vocab_size: PositiveInt  # of the model: already rounded up
    total_length: NonNegativeInt
    tokenizer_info: TokenizerInfo


def stored_config(run: Path) -> dict[str, Any] | None:
    """The configuration in a run directory; None where there is none."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        stored = parse_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("arch"), dict):
        raise ValueError(f"{path} holds no run's configuration; it has no arch section")
    return stored


def stored_metadata(run: Path) -> TrainMetadata:
    """The data record in a run directory."""
    path = run / METADATA_FILE
    try:
        return TrainMetadata.model_validate(parse_yaml(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: the folder is no whole run directory"
        ) from None
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        told = "; ".join(reason.removeprefix(": ") for reason in reasons)
        raise ValueError(f"{path} is no record of training data: {told}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no record of training data: {error}") from None


def tokens_of_run(run: Path) -> tuple[TokenizerInfo, Path]:
    """What a run knows of its tokens, and the folder to look for the tokenizer in.

    The run's own copy of the tokenizer goes before the place that it came from.
    """
    info = stored_metadata(run).tokenizer_info
    if (run / TOKENIZER_FILE).is_file():
        return info.model_copy(update={"tokenizer_path": str(run)}), run
    return info, run


def require_best(run: Path) -> None:
    """FileNotFoundError where a run has kept no checkpoint of its lowest held-out loss."""
    if not (run / BEST).is_dir():
        raise FileNotFoundError(
            f"{run} has no {BEST}: the lowest held-out loss is kept where val_data.path=... "
            "val_data.keep_best=true says so; name an epoch or a step, or leave it open"
        )


def choose_checkpoint(
    run: Path, *, epoch: int | None = None, step: int | None = None, best: bool = False
) -> Checkpoint:
    """A run's checkpoint: of an epoch, a step or the lowest loss, else the newest complete one."""
    if best:
        require_best(run)
        return read_checkpoint(run / BEST)
    if epoch is not None and not (run / f"fsdp2_epoch_{epoch}").exists():
        there = sorted(path.name for path in run.glob("fsdp2_epoch_*"))
        raise FileNotFoundError(
            f"{run}: fsdp2_epoch_{epoch} is no complete checkpoint; it has "
            f"{', '.join(there) or 'none'}"
        )
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


def fingerprint_of(data: SampledData, epochs: int) -> str:
    """What tells the data of a run apart, and over how many epochs it was taken."""
    return f"{epochs}:{data.fingerprint(epochs)}"


def require_same_vocabulary(run: Path, data: SampledData) -> list[str]:
    """ValueError where the ids of the data are not those that a run's weights were trained on.

    Returns what could not be compared, for the user.
    """
    metadata, (info, there) = stored_metadata(run), tokens_of_run(run)
    data_info = data.metadata.tokenizer_info
    differences = token_differences((data_info, data.folder), (info, there))
    if metadata.vocab_size != data.metadata.padded_vocab_size:
        sizes = f"{data.metadata.padded_vocab_size} ids, {metadata.vocab_size} there"
        differences.insert(0, f"it has {sizes}")
    if differences:
        raise ValueError(
            f"{data.folder} has another vocabulary than {run}: {'; '.join(differences)}; make the "
            f"data with that run's tokenizer (tokenizer_path: {info.tokenizer_path}), or leave "
            "resume_from out and train from the beginning"
        )
    if vocabulary(info, there) and vocabulary(data_info, data.folder):
        return []
    return ["vocabulary: sizes and special tokens agree; the tokenizers are not here to compare"]
