"""Useful floating-point operations of a net, counted from the order in which it applies its stacks.

Multiply and add count as two. Norms, gates and the embedding are left out, as is usual for MFU
(arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from models.transformer import NetConfig, StackConfig


def core_parameters(config: NetConfig) -> int:
    """Weights of all stacks, each counted once however often it is applied."""
    return sum(stack.num_parameters for stack in config.stacks().values())


def total_parameters(config: NetConfig, vocab_size: int) -> int:
    """The same with token embedding and head."""
    return core_parameters(config) + 2 * vocab_size * config.hidden_size


def training_flops_per_token(
    config: NetConfig, vocab_size: int, *, backprop_steps: int | None, mean_keys: float
) -> float:
    """FLOPs of one training step per token of the row.

    Each application costs 2 FLOPs per weight forward and, where it carries gradient, twice that
    backward; so does attention, with 4 * D * `mean_keys` a layer. The head costs 6 * D * V.
    """
    stacks = config.stacks()
    flops = 6.0 * config.hidden_size * vocab_size
    for application in config.applications(backprop_steps):
        forward = _application_flops(stacks[application.stack], mean_keys)
        flops += forward * (3 if application.keeps_gradient else 1)
    return flops


def forward_flops_per_token(config: NetConfig, vocab_size: int, *, mean_keys: float) -> float:
    """FLOPs of a pass without gradient per token whose logits are wanted (a decoded one)."""
    stacks = config.stacks()
    core = sum(
        _application_flops(stacks[application.stack], mean_keys)
        for application in config.applications()
    )
    return core + 2.0 * config.hidden_size * vocab_size


def _application_flops(stack: StackConfig, mean_keys: float) -> float:
    attention = 4 * stack.hidden_size * mean_keys * stack.n_layers
    return 2 * stack.num_parameters + attention
