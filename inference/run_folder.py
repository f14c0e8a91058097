"""A run directory as something to ask: which checkpoint, which weights of it, which net.

Nothing in its files is a path that is followed, except where the tokenizer and the data lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from data_io.sampled_format import TokenizerInfo
from models import ArchConfig
from models.language_model import LanguageModel
from models.lora import LoraConfig, is_adapter
from models.transformer import NetConfig
from training.adapters import read_merged_into, stored_lora
from training.checkpoint import (
    BEST,
    CONFIG_FILE,
    EMA,
    MODEL,
    Checkpoint,
    RunDirectory,
    read_checkpoint,
)
from training.distributed import World
from training.environment import recorded_choices
from training.export_format import ARCH_ADAPTER, REFERENCE_NETS
from training.run_records import require_best, stored_config, stored_metadata, tokens_of_run
from training.tensor_store import tensor_shapes


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A run's model whose weights are still on disk, their digests checked."""

    run: Path
    arch: NetConfig  # as trained
    vocab_size: int
    max_seq_len: int
    tokenizer_info: TokenizerInfo
    data_folder: Path  # as the run gives it; nothing is loaded from there
    weights: Path  # the folder of tensors
    taken: str  # which checkpoint and which weights, in words
    notes: tuple[str, ...]  # what was passed over
    choices: Mapping[str, Any]  # kernels and threads that the run recorded
    lora: LoraConfig | None = None  # adapters in the weights

    @property
    def call_adapters(self) -> LoraConfig | None:
        """Adapters that are one for each call of a stack: the model must have them too."""
        return self.lora if self.lora and self.lora.per_cycle else None

    def load_into(self, model: LanguageModel) -> None:
        """Fills parameters and buffers, in the type and on the device that they have.

        Adapters shared by all calls of a stack are merged into its weights.
        """
        targets = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        stored = tensor_shapes(self.weights)
        is_merged = self.lora is not None and not self.lora.per_cycle
        known = {name for name in stored if is_merged and is_adapter(name)}.union(targets)
        strange = sorted(set(stored) - known)
        if strange:
            raise ValueError(
                f"{self.weights} holds {strange[0]!r} ({len(strange)} such tensors), which the net "
                "of all_config.yaml does not have; the two are of different runs"
            )
        read_merged_into(self.weights, targets, self.lora if is_merged else None)


def open_run(
    run: Path,
    *,
    epoch: int | None = None,
    step: int | None = None,
    best: bool | None = None,
    use_ema: bool | None = None,
) -> StoredModel:
    """A run's model after an epoch, a step or its lowest loss, else its newest whole checkpoint.

    `use_ema` None: averaged weights where they were kept. ValueError or FileNotFoundError where
    there is none, or nothing that this version knows.
    """
    config = stored_config(run)
    if config is None:
        is_checkpoint = (run.parent / CONFIG_FILE).is_file()
        hint = f"; {run.parent} is one: name that, and the epoch or the step beside it"
        raise FileNotFoundError(
            f"{run} is no run directory: it has no {CONFIG_FILE}{hint * is_checkpoint}"
        )
    arch = _arch(run, config["arch"])
    metadata = stored_metadata(run)
    lora = stored_lora(config)
    name = _name(epoch, step, best)
    checkpoint, notes = _checkpoint(run, name, use_ema)
    takes_ema = _takes_ema(checkpoint, use_ema)
    progress = checkpoint.progress
    kind = "EMA" if takes_ema else "raw"
    info, _ = tokens_of_run(run)
    return StoredModel(
        run,
        arch,
        metadata.vocab_size,
        metadata.max_seq_len,
        info,
        Path(str(config.get("data", {}).get("path"))),
        checkpoint.path / (EMA if takes_ema else MODEL),
        f"{checkpoint.path} (epoch {progress.epoch}, step {progress.step:,}, {kind} weights)",
        (*notes, *_adapter_note(lora)),
        recorded_choices(run),
        lora,
    )


def _adapter_note(lora: LoraConfig | None) -> list[str]:
    if lora is None:
        return []
    how = "one for each call of a stack" if lora.per_cycle else "merged into its weights"
    return [f"adapters of rank {lora.rank}, {how}"]


def _name(epoch: int | None, step: int | None, best: bool | None) -> str | None:
    if best:
        return BEST
    if epoch is not None:
        return f"fsdp2_epoch_{epoch}"
    return None if step is None else f"fsdp2_step_{step}"


def _arch(run: Path, settings: Mapping[str, Any]) -> NetConfig:
    name = settings.get("name")
    if name in REFERENCE_NETS:
        raise ValueError(
            f"{run} was written by the original trainer (arch.name={name}); python -m "
            f"conversion.convert_from_reference --ckpt_path {run} --out_dir ... makes a run "
            "directory of it that can be asked"
        )
    known = [
        tag
        for net in get_args(get_args(ArchConfig)[0])
        for tag in get_args(net.model_fields["name"].annotation)
    ]
    if name not in known:
        raise ValueError(
            f"{run}: arch.name={name!r} is no architecture of this version; it knows "
            f"{', '.join(known)}"
        )
    try:
        return ARCH_ADAPTER.validate_python(settings)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, ('arch', *fault['loc'][1:])))}={fault['input']!r:.80}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ValueError(
            f"{run / 'all_config.yaml'} describes no architecture of this version: {faults}"
        ) from None


def _checkpoint(
    run: Path, name: str | None, use_ema: bool | None
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint that is asked for, its weights checked, and which newer ones are damaged."""
    if name == BEST:
        require_best(run)
    if name is not None:
        if not (run / name).is_dir():
            raise FileNotFoundError(f"{run} has no {name}; it has {_there(run)}")
        checkpoint = read_checkpoint(run / name)
        _verify(checkpoint, use_ema)
        return checkpoint, ()
    directory = RunDirectory(run, World(rank=0, size=1, device=torch.device("cpu")))
    passed_over = directory.damaged()
    for checkpoint in reversed(directory.checkpoints()):
        _takes_ema(checkpoint, use_ema)
        try:
            _verify(checkpoint, use_ema)
        except ValueError as error:
            passed_over.append(str(error))
            continue
        return checkpoint, tuple(f"passed over: {reason}" for reason in passed_over)
    reasons = "".join(f"; {reason}" for reason in passed_over)
    raise FileNotFoundError(
        f"{run} holds no complete checkpoint (fsdp2_epoch_N or fsdp2_step_N){reasons}; train it "
        "further, or give another folder"
    )


def _verify(checkpoint: Checkpoint, use_ema: bool | None) -> None:
    checkpoint.verify(EMA if _takes_ema(checkpoint, use_ema) else MODEL)


def _takes_ema(checkpoint: Checkpoint, use_ema: bool | None) -> bool:
    if use_ema and not checkpoint.has_ema:
        raise ValueError(
            f"{checkpoint.path} holds no EMA weights: its run kept none (ema=null); leave "
            "ckpt_use_ema out, or give ckpt_use_ema=false"
        )
    return checkpoint.has_ema if use_ema is None else use_ema


def _there(run: Path) -> str:
    return ", ".join(sorted(path.name for path in run.glob("fsdp2_*_*"))) or "no checkpoint"
