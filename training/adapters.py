"""Weights of runs whose adapters are merged while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from models.lora import LoraConfig, adapters_of, is_adapter, merged
from training.tensor_store import read_tensors_into, tensor_shapes


def stored_lora(config: Mapping[str, Any]) -> LoraConfig | None:
    """The adapters of a run, from its configuration; ValueError where they make no sense."""
    settings = config.get("lora")
    if settings is None:
        return None
    try:
        return LoraConfig.model_validate(settings)
    except ValidationError as error:
        finding = error.errors()[0]
        where = ".".join(map(str, ("lora", *finding["loc"])))
        raise ValueError(f"{where}={finding['input']!r}: {finding['msg']}") from None


def read_merged_into(folder: Path, tensors: Mapping[str, Tensor], lora: LoraConfig | None) -> None:
    """`read_tensors_into`, each weight merged with its adapter where it has one.

    Merging is done in fp32, a weight at a time.
    """
    assert lora is None or not lora.per_cycle, "adapters of single calls are part of no one weight"
    stored = tensor_shapes(folder) if lora else {}
    adapted = [name for name in tensors if adapters_of(name)[0] in stored]
    plain = {name: tensor for name, tensor in tensors.items() if name not in adapted}
    if plain:
        read_tensors_into(folder, plain)
    for name in adapted:
        assert lora is not None
        target = tensors[name]
        parts = {part: torch.empty(stored[part]) for part in adapters_of(name)}
        weight = torch.empty(target.shape)
        read_tensors_into(folder, {name: weight, **parts})
        whole = merged(weight, *parts.values(), scale=lora.scale)
        if isinstance(target, DTensor):  # every rank has read it: none sends it
            whole = distribute_tensor(
                whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(whole)


def read_start_into(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    there: LoraConfig | None,
    here: LoraConfig | None,
) -> None:
    """Overwrites `tensors` of a run that starts from another, each with adapters or without.

    Adapters of another kind than ours are merged, and ours stay as they are.
    """
    if there == here:
        read_tensors_into(folder, tensors)
    else:
        weights = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
        read_merged_into(folder, weights, there)
