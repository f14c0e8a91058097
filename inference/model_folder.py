"""Folders that hold a model: a run directory, an exported folder, the published weights.

Owns what is taken from them and how it runs here: net, weights, tokenizer, device, kernels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from data_io.prompt_format import TOKENIZER_FILE, PromptFormat
from data_io.sampled_format import TokenizerInfo
from inference.depth import at_depth, depth_of, net_name
from inference.exported_folder import ExportedModel, is_exported, read_exported
from inference.run_folder import StoredModel, open_run
from inference.tokenizer_check import prompt_format_of
from models.attention import select_attention
from models.flops import total_parameters
from models.language_model import LanguageModel
from models.linear import KERNELS, pick_linear_kernel, set_linear_kernel
from models.lora import add_adapters
from models.transformer import NetConfig
from training.building import compute_dtype
from training.checkpoint import CONFIG_FILE
from training.distributed import pick_device


class ModelOptions(BaseModel):
    """Which model is asked, and how it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ckpt_path: Path = Field(description="run directory, exported folder, or published weights")
    ckpt_epoch: PositiveInt | None = Field(
        default=None, description="checkpoint of this epoch (null: the newest complete one)"
    )
    ckpt_step: NonNegativeInt | None = Field(default=None, description="checkpoint of this step")
    ckpt_best: bool | None = Field(
        default=None, description="checkpoint of the lowest held-out loss (val_data.keep_best)"
    )
    ckpt_use_ema: bool | None = Field(
        default=None, description="averaged weights (null: where they were kept)"
    )
    tokenizer_path: Path | None = Field(
        default=None, description="tokenizer.json or its folder (null: the model's own)"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights (auto: bfloat16 on CUDA, else float32)"
    )
    attention: str = Field(default="auto", description="attention kernel, as in pretrain.py")
    decode: Literal["auto", "eager", "compiled", "cuda_graph"] = Field(
        default="auto", description="how one token more is computed"
    )
    batch_size: PositiveInt = Field(default=64, description="answers made at a time, at most")
    H_cycles: PositiveInt | None = Field(
        default=None, description="slow updates (null: as trained)"
    )
    L_cycles: PositiveInt | None = Field(
        default=None, description="fast updates per slow one (null: as trained)"
    )
    cycles: PositiveInt | None = Field(default=None, description="of ut (null: as trained)")

    @model_validator(mode="after")
    def _check_one_checkpoint(self) -> Self:
        named = {"ckpt_epoch": self.ckpt_epoch, "ckpt_step": self.ckpt_step}
        named |= {"ckpt_best": "true" if self.ckpt_best else None}
        given = [f"{name}={value}" for name, value in named.items() if value is not None]
        if len(given) > 1:
            count = "two" if len(given) == 2 else "three"
            raise ValueError(f"{' and '.join(given)} name {count} checkpoints; give one of them")
        return self


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model in memory, and what it was trained with."""

    model: LanguageModel
    prompt_format: PromptFormat
    max_context: int
    trained: NetConfig  # as trained; `model.config` is as it runs
    description: str  # what was taken, in one line
    stored: StoredModel | ExportedModel  # where it was taken from


def open_model(options: ModelOptions) -> OpenedModel:
    """Reads the weights that are wanted and no others, straight into the type that they run in.

    ValueError or FileNotFoundError where the folder holds no model that this version knows.
    """
    stored = _open_folder(options)
    prompt_format = _prompt_format(stored, options.tokenizer_path)
    depth = {"H_cycles": options.H_cycles, "L_cycles": options.L_cycles, "cycles": options.cycles}
    arch = at_depth(stored.arch, **depth)
    if stored.call_adapters and arch != stored.arch:
        raise ValueError(
            f"{options.ckpt_path} has an adapter for each of its calls, so its depth is fixed; "
            f"leave {', '.join(name for name, value in depth.items() if value is not None)} out"
        )
    device = _device(options.device)
    dtype = compute_dtype(options.dtype, device)
    attention, _ = select_attention(
        options.attention,
        device=device,
        dtype=dtype,
        head_size=max(stack.head_size for stack in arch.stacks().values()),
    )
    choices = stored.choices if isinstance(stored, StoredModel) else {}
    kernels = _choose_cpu_kernels(choices, arch.hidden_size) if device.type == "cpu" else ""
    with torch.device("meta"):  # shapes alone: neither drawn nor in memory
        model = LanguageModel(arch, stored.vocab_size, attention)
        if stored.call_adapters:
            add_adapters(model, stored.call_adapters)
    model = model.requires_grad_(False).to(dtype).to_empty(device=device).eval()
    stored.load_into(model)
    size = total_parameters(arch, stored.vocab_size) / 1e6
    taken = stored.taken if isinstance(stored, StoredModel) else f"{stored.path} (exported)"
    parts = (
        f"{net_name(arch)}, {size:,.{1 if size >= 10 else 2}f} M parameters",
        f"{device}, {str(dtype).removeprefix('torch.')}",
        f"attention {attention.name}{kernels}",
    )
    notes = "".join(f"; {note}" for note in (*_depth_notes(stored.arch, arch), *stored.notes))
    return OpenedModel(
        model,
        prompt_format,
        stored.max_seq_len,
        stored.arch,
        f"loaded {taken}: {'; '.join(parts)}{notes}",
        stored,
    )


def _open_folder(options: ModelOptions) -> StoredModel | ExportedModel:
    path = options.ckpt_path
    if not path.is_dir():
        what = "a file" if path.is_file() else "no folder here"
        raise FileNotFoundError(
            f"{path} is {what}; ckpt_path is a run directory or an exported folder"
        )
    if not (path / CONFIG_FILE).is_file() and is_exported(path):
        given = {"ckpt_epoch", "ckpt_step", "ckpt_best", "ckpt_use_ema"} & options.model_fields_set
        given = sorted(name for name in given if getattr(options, name) is not None)
        if given:
            raise ValueError(
                f"{path} is an exported folder, which holds one set of weights; leave "
                f"{', '.join(given)} out"
            )
        return read_exported(path)
    if not (path / CONFIG_FILE).is_file():
        is_checkpoint = (path.parent / CONFIG_FILE).is_file()
        hint = f"; its run directory is {path.parent}" if is_checkpoint else ""
        raise FileNotFoundError(
            f"{path} holds no model: it is neither a run directory ({CONFIG_FILE}) nor an exported "
            f"folder (config.json){hint}"
        )
    return open_run(
        path,
        epoch=options.ckpt_epoch,
        step=options.ckpt_step,
        best=options.ckpt_best,
        use_ema=options.ckpt_use_ema,
    )


def _prompt_format(stored: StoredModel | ExportedModel, given: Path | None) -> PromptFormat:
    whose = stored.run if isinstance(stored, StoredModel) else stored.path
    if isinstance(stored, ExportedModel) and stored.tokenizer_info == TokenizerInfo():
        raise FileNotFoundError(
            f"{whose} has no {TOKENIZER_FILE}, so it cannot be asked in words; put the one that "
            "made its training data there"
        )
    return prompt_format_of(
        stored.tokenizer_info, given, places=[whose], vocab_size=stored.vocab_size, whose=whose
    )


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in name and not index.isdigit()):
        raise ValueError(f"device={name} is none of auto, cpu, cuda, cuda:1 (and so on), mps")
    device = pick_device(kind)
    if not index or kind == "cpu":
        return device
    if kind == "mps" or int(index) >= torch.cuda.device_count():
        there = torch.cuda.device_count() if kind == "cuda" else 1
        raise ValueError(f"device={name}: this machine has {there} of that kind, counted from 0")
    return torch.device(kind, int(index))


def _choose_cpu_kernels(recorded: Mapping[str, Any], width: int) -> str:
    """Sets the linear kernel and the threads of this process, and says which.

    Both as in the run if it was trained on a CPU, so that they need not be found out again.
    """
    is_of_cpu = recorded.get("device") == "cpu"
    name = recorded.get("linear") if is_of_cpu else None
    has_onednn = torch.backends.mkldnn.is_available()
    if name not in KERNELS or (name == "onednn" and not has_onednn):
        name, _ = pick_linear_kernel(torch.device("cpu"), width)
    set_linear_kernel(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = recorded.get("threads") if is_of_cpu else None
    if isinstance(threads, int) and 1 <= threads <= (cores or 1) and not _threads_are_given():
        torch.set_num_threads(threads)
    count = torch.get_num_threads()
    return f", linear {name}, {count} thread{'s' * (count > 1)}"


def _threads_are_given() -> bool:
    return bool(os.environ.get("OMP_NUM_THREADS"))


def _depth_notes(trained: NetConfig, arch: NetConfig) -> list[str]:
    before = depth_of(trained)
    return [
        f"{name}={value} (trained with {before[name]})"
        for name, value in depth_of(arch).items()
        if value != before[name]
    ]
