"""PrefixLM attention through `torch.nn.attention.varlen` (FlashAttention 2 inside torch)."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from models.attention.two_pass import Segments, TwoPassPlan, two_pass_plan
from models.batch import PackedLayout

MODULE = "torch.nn.attention.varlen"  # since torch 2.10
MAX_HEAD, HEAD_MULTIPLE = 256, 8
MAX_HEAD_ANYWHERE = 192  # larger ones have a backward pass on these chips alone:
LARGE_HEAD_CAPABILITIES = ((8, 0), (9, 0))


class VarlenAttention:
    """CUDA from compute capability 8.0 on, in half precision."""

    name = "varlen"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        reason = why_no_flash(device, dtype, head_size)
        if reason is not None:
            return reason
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if head_size > MAX_HEAD_ANYWHERE and capability not in LARGE_HEAD_CAPABILITIES:
            return f"head size {head_size} has no backward pass on this GPU"
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> TwoPassPlan:
        return two_pass_plan(layout, num_rows, varlen_kernel)


def why_no_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """What keeps any FlashAttention kernel from running there, or None."""
    if device.type != "cuda":
        return "not CUDA"
    if torch.version.hip:
        return "a ROCm build, on which it is untested"
    if find_spec(MODULE) is None:
        return f"torch {torch.__version__} has no {MODULE}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is not half precision"
    if head_size > MAX_HEAD or head_size % HEAD_MULTIPLE:
        return f"head size {head_size} is not a multiple of {HEAD_MULTIPLE} up to {MAX_HEAD}"
    return None


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """One call of it, through whichever FlashAttention is active in torch."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second, of which CPUs are spared

    # The lengths are on CPU: no sync. A compiled stack reads them too (capture_scalar_outputs).
    max_q, max_k = int(segments.max_q), int(segments.max_k)
    window = (-1, 0) if segments.is_causal else (-1, -1)
    mixed = varlen_attn(
        query, key, value, segments.cu_q, segments.cu_k, max_q, max_k, window_size=window
    )
    assert isinstance(mixed, Tensor)
    return mixed
