"""Figures by which a recurrent net is debugged: states by cycle; gradients and updates by level.

Measured at the steps that are logged, where `log_recurrence=true`. docs/watching.md says how to
read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import PackedBatch
from models.language_model import LanguageModel
from models.transformer import NetConfig, Stack
from training.adam_atan2 import AdamATan2
from training.distributed import World, reshard
from training.host_state import num_copies


@torch.no_grad()
def state_figures(model: LanguageModel, batch: PackedBatch, world: World) -> dict[str, float]:
    """`state/z_H_1/norm`, `state/z_H_2/change`, ...: each state as each of its calls leaves it.

    norm: root mean square over the D values of a token, as the last block leaves them: the final
    norm of a pre-norm stack then makes it 1. change: |after - before| / |before|, not there for a
    state's first call. Means over the real tokens of one micro-batch of every rank, by a forward
    pass of its own; every rank calls it.
    """
    trace = _StateSums(int(batch.layout.num_tokens))
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    hooks = [stack.layers[-1].register_forward_hook(trace.keep_stream) for stack in stacks]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would call no hooks
            model(batch.tokens, batch.positions, batch.layout, trace=trace)
    finally:
        for hook in hooks:
            hook.remove()
        reshard(model)
    sums = torch.stack(list(trace.sums.values())).cpu().double()
    *totals, num_tokens = world.sum(torch.cat((sums, torch.tensor([trace.num_tokens])))).tolist()
    return {
        f"state/{name}": total / max(1, num_tokens)
        for name, total in zip(trace.sums, totals, strict=True)
    }


class _StateSums:
    """Adds up over the first `num_tokens` rows; what comes after them is padding."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.sums: dict[str, Tensor] = {}  # by figure, [] each
        self._calls: Counter[str] = Counter()
        self._stream: Tensor | None = None  # [T, D] of the call under way

    def keep_stream(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self._stream = output

    def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
        assert self._stream is not None
        self._calls[name] += 1
        call = f"{name}_{self._calls[name]}"
        stream, after = (state[: self.num_tokens].float() for state in (self._stream, after))
        self.sums[f"{call}/norm"] = stream.square().mean(-1).sqrt().sum()
        if before is not None:
            before = before[: self.num_tokens].float()
            change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
            self.sums[f"{call}/change"] = change.sum()


class UpdateFigures:
    """Norms of gradients and updates by level, of one step: the optimizer shows it what it does."""

    def __init__(self, model: LanguageModel, world: World) -> None:
        self.world = world
        self._level_of: dict[Tensor, str] = {
            param: level_of(name, model.config) for name, param in model.named_parameters()
        }
        self._copies = num_copies(model.lm_head.weight)
        self._norms: list[tuple[str, Tensor]] = []  # level; [3] of gradient, update, weights

    def add(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        """Takes in some parameters, each with this rank's part of its gradient and weights.

        A parameter without gradient never comes here.
        """
        for param, grad, old, new in zip(params, grads, before, after, strict=True):
            norms = [torch.linalg.vector_norm(tensor) for tensor in (grad, new - old, old)]
            self._norms.append((self._level_of[param], torch.stack(norms)))

    def take(self) -> dict[str, float]:
        """`grad_norm/H`, `update_norm/H`, `update_ratio/H`, ... of all ranks, and `/total`.

        Gradients are those of the mean loss per scored token, updates include weight decay, and
        the ratio is to the norm of the weights before. Where no gradient arrived, all are 0.
        Every rank calls it, once.
        """
        levels = sorted(set(self._level_of.values()))
        squares = torch.zeros(len(levels), 3, dtype=torch.float64)
        if self._norms:
            norms = torch.stack([norm for _, norm in self._norms]).cpu().double()
            rows = torch.tensor([levels.index(level) for level, _ in self._norms])
            squares.index_add_(0, rows, norms.square())
        squares = self.world.sum(squares) / self._copies
        named = dict(zip(levels, squares, strict=True)) | {"total": squares.sum(0)}
        values: dict[str, float] = {}
        for level, of_level in named.items():
            gradient, update, weights = of_level.sqrt().tolist()
            # Ranks divide by their average share of the scored tokens, and gradients are summed.
            values[f"grad_norm/{level}"] = gradient / self.world.size
            values[f"update_norm/{level}"] = update
            values[f"update_ratio/{level}"] = update / max(weights, 1e-12)
        return values


@contextmanager
def watched(
    model: LanguageModel,
    optimizer: AdamATan2,
    micro_batches: Sequence[PackedBatch],
    world: World,
    is_watched: bool,
) -> Iterator[dict[str, float]]:
    """All figures of the step that is taken inside, there once it is done; none if not watched.

    States are those of the weights and the first micro-batch that the step begins with.
    """
    figures: dict[str, float] = {}
    if not is_watched:
        yield figures
        return
    figures |= state_figures(model, micro_batches[0], world)
    optimizer.watch = updates = UpdateFigures(model, world)
    try:
        yield figures
    finally:
        optimizer.watch = None
    figures |= updates.take()


def level_of(parameter: str, config: NetConfig) -> str:
    """H, L, embedding or head; `stack` where one stack serves all levels."""
    stacks = config.stacks()
    for name in stacks:
        if parameter.startswith(f"model.{name}."):
            return name.removesuffix("_module") if len(stacks) > 1 else "stack"
    return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}[parameter]
