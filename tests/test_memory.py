"""Calls without gradient keep no activations: depth costs memory only where it is trained."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from net_cases import NETS, build, random_row
from torch import Tensor, nn

from models.language_model import LanguageModel

ROW = ((6, 3, 11), (4, 0, 9))


def saved_bytes_by_call(model: LanguageModel, backprop_steps: int | None) -> list[int]:
    """Bytes that autograd keeps for each call of a stack, in order; weights aside."""
    row = random_row(*ROW)
    saved: Counter[int] = Counter()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    call, is_inside = -1, False

    def enter(module: nn.Module, inputs: Any) -> None:
        nonlocal call, is_inside
        call, is_inside = call + 1, True

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal is_inside
        is_inside = False

    def keep(tensor: Tensor) -> Tensor:
        if is_inside and tensor.untyped_storage().data_ptr() not in weights:
            saved[call] += tensor.nbytes
        return tensor

    stacks = [model.model.get_submodule(name) for name in model.config.stacks()]
    hooks = [stack.register_forward_pre_hook(enter) for stack in stacks]
    hooks += [stack.register_forward_hook(leave) for stack in stacks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(row.tokens, row.positions, row.layout, backprop_steps)
    for hook in hooks:
        hook.remove()
    return [saved[index] for index in range(call + 1)]


@pytest.mark.parametrize("net", NETS)
def test_exactly_the_calls_with_gradient_keep_activations(net: str) -> None:
    config = NETS[net]
    for backprop_steps in (1, 2, 3, 5, 8) if config.model_dump()["name"] == "hrm" else (None,):
        kept = saved_bytes_by_call(build(config), backprop_steps)
        wanted = [call.keeps_gradient for call in config.applications(backprop_steps)]
        assert [num_bytes > 0 for num_bytes in kept] == wanted


def test_memory_grows_with_the_calls_that_carry_gradient_alone() -> None:
    model = build(NETS["hrm"])
    two, five = (saved_bytes_by_call(model, steps) for steps in (2, 5))
    one_call = max(five)
    assert sum(five) == 5 * one_call
    assert one_call < sum(two) <= 2 * one_call  # the first one keeps less: its input is constant


def test_nothing_is_kept_without_gradient() -> None:
    model = build(NETS["hrm"])
    with torch.no_grad():
        assert not any(saved_bytes_by_call(model, 5))
