"""PrefixLM attention through FlashAttention 3 (Hopper), where its package is installed.

torch's variable-length attention calls it once it is activated, and brings the declarations that
compiling needs; those of the package's own functions cannot be traced for unknown lengths.
"""

from __future__ import annotations

import importlib

import torch
from torch.nn import attention

from models.attention.two_pass import TwoPassPlan, two_pass_plan
from models.attention.varlen import varlen_kernel, why_no_flash
from models.batch import PackedLayout

PACKAGE = "flash_attn_interface"
HOPPER = 9  # major compute capability


class Flash3Attention:
    """Hopper GPUs with flash-attn 3, in half precision."""

    name = "flash3"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        reason = why_no_flash(device, dtype, head_size)
        if reason is not None:
            return reason
        if torch.cuda.get_device_capability(device)[0] != HOPPER:
            return "not a Hopper GPU"
        try:
            importlib.import_module(PACKAGE)
        except (ImportError, OSError) as error:
            return f"flash-attn 3 cannot be imported ({error})"
        return None

    def prepare(self, layout: PackedLayout, num_rows: int) -> TwoPassPlan:
        if attention.current_flash_attention_impl() != "FA3":
            attention.activate_flash_attention_impl("FA3")  # for the rest of the process
        return two_pass_plan(layout, num_rows, varlen_kernel)
