"""PrefixLM attention: one interface, several kernels, and the choice among them."""

from __future__ import annotations

import torch

from models.attention.dense import DenseAttention
from models.attention.flash3 import Flash3Attention
from models.attention.flex import FlexAttention
from models.attention.interface import AttentionBackend, AttentionPlan
from models.attention.one_pass import TritonAttention
from models.attention.sdpa import SdpaAttention
from models.attention.varlen import VarlenAttention

# In order of preference. Never chosen by themselves: the oracle, and our own kernels, until a GPU
# has shown that they are faster.
BACKENDS: tuple[AttentionBackend, ...] = (
    Flash3Attention(),
    VarlenAttention(),
    FlexAttention(),
    SdpaAttention(),
)
BY_NAME_ALONE: tuple[AttentionBackend, ...] = (TritonAttention(), DenseAttention())
BACKENDS_BY_NAME = {backend.name: backend for backend in (*BACKENDS, *BY_NAME_ALONE)}


def select_attention(
    name: str, *, device: torch.device, dtype: torch.dtype, head_size: int
) -> tuple[AttentionBackend, str]:
    """The backend of that name, or for `auto` the fastest that works here, and why it is the one.

    ValueError for an unknown name, or one that cannot run on this device with these sizes.
    """
    if name != "auto":
        if name not in BACKENDS_BY_NAME:
            raise ValueError(f"attention={name} is none of auto, {', '.join(BACKENDS_BY_NAME)}")
        backend = BACKENDS_BY_NAME[name]
        reason = backend.why_not(device, dtype, head_size)
        if reason is not None:
            raise ValueError(f"attention={name} cannot run here: {reason}; use attention=auto")
        return backend, "asked for"
    refused = []
    for backend in BACKENDS:
        reason = backend.why_not(device, dtype, head_size)
        if reason is None:
            return backend, "; ".join(refused) or "the fastest that works here"
        refused.append(f"{backend.name}: {reason}")
    raise AssertionError("sdpa runs everywhere")


__all__ = [
    "BACKENDS_BY_NAME",
    "AttentionBackend",
    "AttentionPlan",
    "select_attention",
]
