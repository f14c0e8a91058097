"""A model on its device: precision, attention backend and sharding chosen, and said."""

from __future__ import annotations

import torch

from models.attention import select_attention
from models.language_model import LanguageModel
from training.distributed import World, device_note, shard_model
from training.schema import RunConfig


def build_model(
    config: RunConfig, vocab_size: int, world: World, chosen_attention: str | None
) -> tuple[LanguageModel, dict[str, str]]:
    """A model on its device, sharded, and what was chosen for it."""
    dtype = compute_dtype(config.fwd_bwd_dtype, world.device)
    head_size = max(stack.head_size for stack in config.arch.stacks().values())
    name = config.attention if config.attention != "auto" else chosen_attention or "auto"
    attention, reason = select_attention(
        name, device=world.device, dtype=dtype, head_size=head_size
    )
    model = LanguageModel(config.arch, vocab_size, attention).to(world.device)
    shard_model(model, world, dtype)
    kind = str(dtype).removeprefix("torch.")
    return model, {
        "device": f"{device_note(world.device)}, {kind} compute, {world.size} process(es)",
        "attention": f"{attention.name} ({reason})",
    }


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
