"""Folders that hold a model: a run directory, an exported folder, the published weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_io.prompt_format import PromptFormat
from models.attention import select_attention
from models.language_model import LanguageModel
from models.transformer import NetConfig
from training.building import compute_dtype
from training.distributed import pick_device
from training.export_format import ARCH_ADAPTER
from training.run_records import choose_checkpoint, stored_config, stored_metadata


class ModelOptions(BaseModel):
    """Which model is asked, and how it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ckpt_path: Path = Field(description="run directory, exported folder, or published weights")
    ckpt_epoch: PositiveInt | None = Field(
        default=None, description="checkpoint of this epoch (null: the newest complete one)"
    )
    ckpt_step: NonNegativeInt | None = Field(default=None, description="checkpoint of this step")
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
    batch_size: PositiveInt = Field(default=64, description="answers made at a time, at most")
    H_cycles: PositiveInt | None = Field(
        default=None, description="slow updates (null: as trained)"
    )
    L_cycles: PositiveInt | None = Field(
        default=None, description="fast updates per slow one (null: as trained)"
    )
    cycles: PositiveInt | None = Field(default=None, description="of ut (null: as trained)")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model in memory, and what it was trained with."""

    model: LanguageModel
    prompt_format: PromptFormat
    max_context: int
    trained: NetConfig  # as trained; `model.config` is as it runs
    description: str  # what was taken, in one line


def open_model(options: ModelOptions) -> OpenedModel:
    """Reads the weights that are wanted and no others, in the type that they run in."""
    run = options.ckpt_path
    config = stored_config(run)
    if config is None:
        raise FileNotFoundError(f"{run} is no run directory: it has no all_config.yaml")
    checkpoint = choose_checkpoint(run, epoch=options.ckpt_epoch, step=options.ckpt_step)
    takes_ema = checkpoint.has_ema if options.ckpt_use_ema is None else options.ckpt_use_ema
    arch = ARCH_ADAPTER.validate_python(config["arch"])
    data = stored_metadata(run)
    device = pick_device(options.device)
    dtype = compute_dtype("auto", device)
    attention, _ = select_attention(
        options.attention,
        device=device,
        dtype=dtype,
        head_size=max(stack.head_size for stack in arch.stacks().values()),
    )
    with torch.device("meta"):  # shapes alone: the weights are taken from the file, not copied
        model = LanguageModel(arch, data.vocab_size, attention)
    model.load_state_dict(checkpoint.load_weights(use_ema=takes_ema), assign=True)
    model = model.to(device, dtype).eval()
    kind = "EMA" if takes_ema else "raw"
    return OpenedModel(
        model,
        PromptFormat.from_info(data.tokenizer_info, Path(config["data"]["path"])),
        data.max_seq_len,
        arch,
        f"loaded {checkpoint.path} ({kind} weights, step {checkpoint.progress.step:,})",
    )
