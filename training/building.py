"""A model and its optimizer on their device, and what was chosen for them, and said.

Owns the choice of precision, attention, linear kernel, memory, compilation and sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.attention import AttentionBackend, select_attention
from models.cpu_block import why_no_kernels
from models.language_model import LanguageModel
from models.linear import pick_linear_kernel, set_linear_kernel
from models.transformer import Block
from training.adam_atan2 import AdamATan2
from training.compiling import COMPILED, compile_model, require_compiler
from training.distributed import World, device_note, shard_model
from training.schema import RunConfig
from training.trainable import choose_trained


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model on its device, sharded, and what was chosen for it."""

    model: LanguageModel
    chosen: dict[str, str]  # by setting: used again when the run is continued
    lines: dict[str, str]  # the same for the summary, with reasons


def build_model(
    config: RunConfig, vocab_size: int, world: World, recorded: Mapping[str, Any]
) -> BuiltModel:
    """Builds the model of a run from its initialisation.

    `recorded` holds the choices of the run that is continued: taken again where they are possible.
    """
    dtype = compute_dtype(config.fwd_bwd_dtype, world.device)
    linear, linear_reason = choose_linear(config, world, recorded.get("linear"))
    attention, attention_reason = choose_attention(config, world, recorded.get("attention"))
    require_compiler(config.compile, world.device, attention)
    model = LanguageModel(config.arch, vocab_size, attention)
    trained_lines = choose_trained(model, config)
    model.to(world.device)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = config.activation_checkpointing
    compile_model(model, config.compile)
    unit = COMPILED.get(config.compile, Block)
    shard_model(model, world, dtype, unit=unit, replicas=config.fsdp_replicas)
    kind = str(dtype).removeprefix("torch.")
    return BuiltModel(
        model,
        {
            "attention": attention.name,
            "linear": linear,
            "compile": config.compile,
            "replicas": str(config.fsdp_replicas),
            "device": world.device.type,
        },
        {
            "device": f"{device_note(world.device)}, {kind} compute, {world.size} process(es)"
            f"{_other_world(world, recorded)}",
            "attention": f"{attention.name} ({attention_reason})",
            **({"linear": f"{linear} ({linear_reason})"} if world.device.type == "cpu" else {}),
            **_blocks_line(config, model, dtype),
            **trained_lines,
            **_memory_lines(config, world.device),
            **_compile_line(config, recorded.get("compile", config.compile)),
            **_replicas_line(config, world, recorded.get("replicas", "1")),
        },
    )


def _other_world(world: World, recorded: Mapping[str, Any]) -> str:
    before = recorded.get("processes", world.size)
    told = f"; it was {before}: what is left is packed anew, and the run is no longer bit-equal"
    return "" if before == world.size else told


def build_optimizer(config: RunConfig, model: LanguageModel) -> AdamATan2:
    """The optimizer of a run, its state in host memory where that is asked for and not the same."""
    offloads = config.offload_optimizer and model.lm_head.weight.device.type == "cuda"
    return AdamATan2(
        [param for param in model.parameters() if param.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        ema=config.ema,
        state_device=torch.device("cpu") if offloads else None,
    )


def _memory_lines(config: RunConfig, device: torch.device) -> dict[str, str]:
    lines = {}
    if config.activation_checkpointing != "none":
        part = {"block": "whole blocks", "attention": "attention"}[config.activation_checkpointing]
        lines["activations"] = f"those of {part} are computed again in the backward pass"
    if config.offload_optimizer:
        lines["optimizer"] = (
            "state in host memory"
            if device.type == "cuda"
            else f"state is not offloaded: {device.type} has no memory apart from the host's"
        )
    return lines


def _blocks_line(config: RunConfig, model: LanguageModel, dtype: torch.dtype) -> dict[str, str]:
    """Whether compiled kernels compute blocks; if so, they are compiled now, not in a step."""
    parameter = next(model.parameters())
    is_meant = parameter.device.type == "cpu" and dtype == torch.float32
    is_meant &= config.compile == "none" and model.attention.name == "sdpa" and config.lora is None
    blocks = [each for each in model.modules() if isinstance(each, Block)]
    if not is_meant or not any(each.is_pre_norm for each in blocks):
        return {}
    if missing := why_no_kernels():
        return {"blocks": f"layer by layer ({missing})"}
    from models.cpu_kernels import why_not_cached

    told = f", anew at each start ({why_not_cached[0]})" if why_not_cached else ""
    return {"blocks": f"kernels compiled by numba{told}"}


def _compile_line(config: RunConfig, before: str) -> dict[str, str]:
    changed = f"; it was {before}: the run is no longer bit-equal" * (before != config.compile)
    if config.compile == "none" and not changed:
        return {}
    return {"compile": f"{config.compile}{changed}"}


def _replicas_line(config: RunConfig, world: World, before: str) -> dict[str, str]:
    replicas = config.fsdp_replicas
    is_other = str(replicas) != before
    changed = f"; it was {before}: the run is no longer bit-equal" if is_other else ""
    if replicas == 1 and not changed:
        return {}
    shards = world.size // replicas
    return {"replicas": f"{replicas} of all weights, each in {shards} shard(s){changed}"}


def choose_attention(
    config: RunConfig, world: World, recorded: str | None
) -> tuple[AttentionBackend, str]:
    """The attention backend of a run, and why it is this one."""

    def select(name: str) -> tuple[AttentionBackend, str]:
        return select_attention(
            name,
            device=world.device,
            dtype=compute_dtype(config.fwd_bwd_dtype, world.device),
            head_size=max(stack.head_size for stack in config.arch.stacks().values()),
        )

    if config.attention != "auto" or recorded is None:
        return select(config.attention)
    try:
        return select(recorded)[0], "as before"
    except ValueError as error:
        backend, reason = select("auto")
        return backend, f"{reason}; {error}: the run is no longer bit-equal"


def choose_linear(config: RunConfig, world: World, recorded: str | None) -> tuple[str, str]:
    """Sets the CPU kernel of fp32 products, the same on all ranks; its name, and why it is this."""
    name, reason = config.linear, "asked for"
    if name == "auto" and recorded:
        name, reason = recorded, "as before"
    elif name == "auto":
        probed = "\n".join(pick_linear_kernel(world.device, config.arch.hidden_size))
        name, reason = world.broadcast(probed).split("\n")
    try:
        set_linear_kernel(name)
    except ValueError as error:
        if reason != "as before":
            raise
        name, reason = "mkl", f"{error}: the run is no longer bit-equal"
        set_linear_kernel(name)
    return name, reason


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on CUDA, fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
