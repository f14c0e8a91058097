"""Executes a net: embeds tokens, applies its stacks in the order that its record gives.

Owns the states of the recurrence and where gradient flows. The order itself belongs to the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from models.layers import AttentionContext, Rope, ScaledEmbedding, truncated_normal
from models.transformer import NetConfig, Stack


class StateTrace(Protocol):
    """Looks on while a net runs: it is shown each state as it is written."""

    def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
        """The state `name` (z_H, ...) becomes `after` [T, D]; `before`: None on the first write."""
        ...


class RecurrentCore(nn.Module):
    """Token embedding, the stacks of a net, and the fixed vector from which z_L starts."""

    def __init__(self, config: NetConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.tells_calls_apart = False  # adapters of its stacks have weights for each call
        for name, stack_config in config.stacks().items():
            self.add_module(name, Stack(stack_config))
        if any("z_L_init" in application.reads for application in config.applications()):
            initial = truncated_normal(config.hidden_size, std=1.0, dtype=torch.bfloat16)
            self.register_buffer("z_L_init", initial)
        in_std = config.answer_stack.in_std
        self.embed_tokens = ScaledEmbedding(vocab_size, config.hidden_size, std=in_std)

    def forward(
        self,
        tokens: Tensor,
        ropes: dict[str, Rope | None],
        contexts: Sequence[AttentionContext],
        backprop_steps: int | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """`tokens` [T] -> the answer [T, D].

        `ropes` holds rotary positions by stack, `contexts` one attention context an application.
        Applications without gradient run under `no_grad`, so that they keep no activations.
        """
        states = {"x": self.embed_tokens(tokens)}
        if "z_L_init" in self._buffers:
            states["z_L_init"] = self.get_buffer("z_L_init")
        with_gradient = torch.is_grad_enabled()
        answer = states["x"]
        calls: dict[str, int] = {}  # of each stack so far; counted where it matters alone
        applications = self.config.applications(backprop_steps)
        for application, context in zip(applications, contexts, strict=True):
            stack = self.get_submodule(application.stack)
            with torch.set_grad_enabled(with_gradient and application.keeps_gradient):
                total = states[application.reads[0]]
                for name in application.reads[1:]:
                    total = total + states[name]
                answer = stack(
                    total, ropes[application.stack], context, calls.get(application.stack, 0)
                )
            if self.tells_calls_apart:
                calls[application.stack] = calls.get(application.stack, 0) + 1
            if trace is not None:
                trace.add(application.writes, states.get(application.writes), answer)
            states[application.writes] = answer
        return answer
