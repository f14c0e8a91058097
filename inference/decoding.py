"""Logits of one more token a row: as it comes, or with static shapes, compiled or as a CUDA graph.

Owns how the model is called, not which tokens it is given. Static shapes: the number of rows is a
power of two (or the cache's), each row is read in the cache's whole length, and the lengths are
counted on the device. A longer cache makes new shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kv_cache import KVCache, RowKernel
from models.language_model import LanguageModel

MODES = ("eager", "compiled", "cuda_graph")
BACKEND = "inductor"  # of `compiled`
VARIANTS = 64  # of the compiled code: numbers of rows and lengths of the cache
WARM_UPS = 2  # before a CUDA graph is captured, so that kernels are loaded and workspaces taken


def pick_decode_mode(mode: str, device: torch.device) -> str:
    """What `auto` means on this device; ValueError for a mode that cannot run there."""
    if mode == "auto":
        return "cuda_graph" if device.type == "cuda" else "eager"
    if mode not in MODES:
        raise ValueError(f"decode={mode} is none of auto, {', '.join(MODES)}")
    if mode == "cuda_graph" and device.type != "cuda":
        raise ValueError(f"decode=cuda_graph needs a CUDA device, not {device}; use decode=auto")
    return mode


def row_kernel(model: LanguageModel) -> RowKernel | None:
    """The kernel for decoding on this device in this type; None: torch's attention."""
    weight = model.lm_head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    from inference.row_kernel import HEAD_SIZE_STEP, NumbaRowKernel  # compiled on import

    sizes = [stack.head_size for stack in model.config.stacks().values()]
    return None if any(size % HEAD_SIZE_STEP for size in sizes) else NumbaRowKernel()


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A CUDA graph of one step for a number of rows."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [rows]: read by the graph
    logits: Tensor  # [rows, V]: written by it


@dataclass(slots=True)
class Decoder:
    """One more token in each of the first rows of a cache."""

    model: LanguageModel
    cache: KVCache
    mode: str
    _graphs: dict[int, CapturedStep] = field(default_factory=dict)
    _compiled: Callable[[Tensor], Tensor] | None = None

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens."""
        if self.mode != "eager" and length > self.cache.max_length:
            length = max(length, 2 * self.cache.max_length)  # few lengths: each is compiled
        if self.cache.reserve(length):
            self._graphs.clear()  # they hold the cache as it was

    def logits(self, tokens: Tensor, num_columns: int) -> Tensor:
        """`tokens` [B] of the first B rows, the longest of `num_columns` with its own: [B, V]."""
        if self.mode == "eager":
            return self.model.logits(self.model.decode(tokens, self.cache, num_columns))
        num_rows = min(1 << (len(tokens) - 1).bit_length(), self.cache.num_rows)
        padded = F.pad(tokens, (0, num_rows - len(tokens)))
        run = self._run_graph if self.mode == "cuda_graph" else self._run_compiled
        return run(padded)[: len(tokens)]

    def _static_step(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model.decode_static(tokens, self.cache))

    def _run_compiled(self, tokens: Tensor) -> Tensor:
        from torch._dynamo import config  # takes seconds, of which other modes are spared

        if self._compiled is None:
            self._compiled = torch.compile(
                self._static_step, backend=BACKEND, dynamic=False, fullgraph=True
            )
        with config.patch(recompile_limit=VARIANTS):
            return self._compiled(tokens)

    def _run_graph(self, tokens: Tensor) -> Tensor:
        step = self._graphs.get(len(tokens))
        if step is None:
            step = self._graphs[len(tokens)] = self._capture(tokens)
        step.tokens.copy_(tokens)
        step.graph.replay()
        return step.logits

    def _capture(self, tokens: Tensor) -> CapturedStep:
        tokens, lengths = tokens.clone(), self.cache.lengths.clone()
        aside = torch.cuda.Stream(tokens.device)
        aside.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self.cache.lengths.copy_(lengths)  # what they write there is written again
                self._static_step(tokens)
            self.cache.lengths.copy_(lengths)
        torch.cuda.current_stream(tokens.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._static_step(tokens)
        return CapturedStep(graph, tokens, logits)
