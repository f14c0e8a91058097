"""What torch.compile takes whole, and what it needs to do so; acts on finished models from outside.

Shapes are those of a run and never change, so code is compiled once per place where it differs
(with or without gradient; `step`: per number of gradient-carrying calls) and never again. Whatever
cannot be compiled is an error: nothing falls back to uncompiled code in silence.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import models
from models.attention import AttentionBackend
from models.recurrence import RecurrentCore
from models.transformer import Block, Stack

CompileMode = Literal["none", "block", "stack", "step"]
# What is compiled as one graph. The loss is in none: its shapes follow the number of scored tokens.
COMPILED: dict[str, type[nn.Module]] = {"block": Block, "stack": Stack, "step": RecurrentCore}
VARIANTS = 64  # of one piece of code; torch's own limit of 8 is below the values that bp may have


class CompileError(ValueError):
    """torch.compile could not compile the model."""


def require_compiler(mode: CompileMode, device: torch.device, attention: AttentionBackend) -> None:
    """ValueError where code of that mode cannot be compiled or run on this device."""
    if mode == "none":
        return
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            f"compile={mode} needs triton on CUDA; pip install triton, or compile=none"
        )
    if device.type != "cpu" and attention.name == "sdpa":
        raise ValueError(
            f"compile={mode}: attention=sdpa compiles on CPU alone; use another attention, "
            "or compile=none"
        )
    if device.type == "cpu" and (missing := _missing_cpp_compiler()):
        raise ValueError(
            f"compile={mode} needs a C++ compiler on CPU, and there is no {missing}; install one "
            "(Debian, Ubuntu: apt install g++), name one in CXX, or use compile=none"
        )


def compile_model(model: nn.Module, mode: CompileMode, *, backend: str = "inductor") -> None:
    """Has every block, every stack or the whole recurrence compiled with its first call.

    Names of parameters stay. Before `shard_model`, whose hooks must stay outside.
    """
    if mode == "none":
        return
    from torch._dynamo import config  # takes seconds, of which other runs are spared

    torch.compiler.config.cache_key_tag = _sources_tag()
    config.capture_scalar_outputs = True  # the lengths that attention kernels are given
    config.recompile_limit = VARIANTS
    for module in model.modules():
        if isinstance(module, COMPILED[mode]):
            module.compile(fullgraph=True, dynamic=False, backend=backend)


def _sources_tag() -> str:
    """Tells versions of models/ apart: torch's cache on disk does not see a change in the gradient
    of an operator of ours, and would go on with the old one."""
    digest = hashlib.sha256()
    for path in sorted(Path(models.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_failures() -> tuple[type[Exception], ...]:
    """What torch raises where it cannot compile; none before anything is compiled."""
    if "torch._dynamo" not in sys.modules:
        return ()
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return FailOnRecompileLimitHit, TorchDynamoException


def compile_error(error: Exception) -> CompileError:
    """A failure of torch.compile in one line; what follows its first two lines is advice."""
    reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
    return CompileError(
        f"the model cannot be compiled ({type(error).__name__}: {reason}); compile=none trains "
        "without"
    )


class CompileClock:
    """Tells when the model has been compiled, and again when more of it has."""

    def __init__(self) -> None:
        self._told_s = compile_s()  # an earlier job of a sweep may have compiled too

    def news(self) -> list[str]:
        """A line after a step that compiled something; none after the others."""
        spent_s = compile_s()
        if spent_s - self._told_s < 1:
            return []
        line = f"compiled in {spent_s - self._told_s:.0f} s"
        self._told_s = spent_s
        return [line]


def compile_s() -> float:
    """Seconds that this process has spent in torch.compile so far."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import cumulative_time_spent_ns

    parts = ("entire_frame_compile", "entire_backward_compile")
    return sum(cumulative_time_spent_ns[part] for part in parts) / 1e9


def _missing_cpp_compiler() -> str | None:
    """The compiler that inductor would call, where there is none."""
    from torch._inductor import config

    names = [name for name in config.cpp.cxx if name]
    return None if any(map(shutil.which, names)) else " or ".join(names)
