"""The optimizer does what the published one does, however its parameters are batched or sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adam_atan2_pytorch import AdamAtan2 as ScaledAdamAtan2
from net_cases import read_case
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import training.adam_atan2
from training.adam_atan2 import AdamATan2
from training.distributed import World, reshard, shard_model, stop_world

SHAPES = ((6, 4), (5,), (), (3, 2, 2), (7,))


def random_params() -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in SHAPES]


def draw_gradients(params: list[Tensor], step: int) -> None:
    """New gradients; a different parameter has none at each step, and one entry is zero."""
    for number, param in enumerate(params):
        param.grad = None if (number + step) % 4 == 0 else torch.randn_like(param)
    params[1].grad = torch.zeros_like(params[1]) if step == 3 else params[1].grad


def five_lines(
    p: Tensor, state: dict[str, Tensor], g: Tensor, lr: float, settings: dict[str, float]
) -> Tensor:
    """The formula of one parameter as it is printed, in fp64."""
    b1, b2 = settings["b1"], settings["b2"]
    state["t"] = state["t"] + 1
    state["m"] = torch.lerp(state["m"], g, 1 - b1)
    state["v"] = b2 * state["v"] + (1 - b2) * g**2
    scale = state["v"].sqrt() / math.sqrt(1 - b2 ** state["t"])
    p = p * (1 - lr * settings["wd"])
    p = p - lr / (1 - b1 ** state["t"]) * torch.atan2(state["m"], scale)
    state["ema"] = torch.lerp(state["ema"], p, 1 - settings["decay"])
    return p


def test_golden_optimizer_steps(golden_optimizer: Path) -> None:
    case, tensors = read_case(golden_optimizer), load_file(golden_optimizer / "tensors.safetensors")
    params = {name: tensors[f"init.{name}"].clone().requires_grad_() for name in case["names"]}
    optimizer = AdamATan2(
        params.values(),
        lr=1.0,
        betas=tuple(case["betas"]),
        weight_decay=case["weight_decay"],
        ema=case["ema"],
    )
    for step, lr in enumerate(case["lr_per_step"]):
        for name, param in params.items():
            param.grad = tensors.get(f"step{step}.grad.{name}")
            assert (param.grad is None) == (name in case["none_grads_per_step"][step])
        optimizer.set_lr(lr)
        optimizer.step()
        found: dict[str, Tensor] = {}
        for name, param in params.items():
            found[f"step{step}.param.{name}"] = param.detach()
            for kind, value in optimizer.state[param].items():
                found[f"step{step}.{kind}.{name}"] = value
        expected = {
            key: value
            for key, value in tensors.items()
            if key.startswith(f"step{step}.") and ".grad." not in key
        }
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    if case["ema"] is not None:
        for name, param in params.items():
            average = optimizer.state[param]["param_ema"]
            swapped = tensors[f"after_swap.param.{name}"]
            torch.testing.assert_close(average, swapped, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_it_computes_the_five_line_formula(beta1: float, weight_decay: float) -> None:
    settings = {"b1": beta1, "b2": 0.95, "wd": weight_decay, "decay": 0.9}
    params = random_params()
    optimizer = AdamATan2(params, lr=1.0, betas=(beta1, 0.95), weight_decay=weight_decay, ema=0.9)
    weights = [param.detach().double() for param in params]
    zeros = [torch.zeros_like(weight) for weight in weights]
    states = [
        {"t": torch.zeros(()), "m": zero, "v": zero, "ema": weight}
        for weight, zero in zip(weights, zeros, strict=True)
    ]
    for step, lr in enumerate((1e-3, 1e-1, 0.0, 3e-2, 1e-2, 1e-2)):
        draw_gradients(params, step)
        for number, param in enumerate(params):
            if param.grad is not None:
                grad = param.grad.double()
                weights[number] = five_lines(weights[number], states[number], grad, lr, settings)
        optimizer.set_lr(lr)
        optimizer.step()
    for param, weight, state in zip(params, weights, states, strict=True):
        ours = optimizer.state[param]
        assert ours["step"] == state["t"]
        assert ("exp_avg" in ours) == (beta1 > 0)
        torch.testing.assert_close(param.detach().double(), weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(ours["param_ema"].double(), state["ema"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("beta1", "steps_before"), [(0.0, 0), (0.9, 1000)])
def test_it_agrees_with_an_independent_package_on_what_both_do(
    beta1: float, steps_before: int
) -> None:
    """`adam-atan2-pytorch` corrects the bias of the mean inside the arctangent, the published
    optimizer in front of it. Both are one where nothing is left to correct: without momentum, and
    after many steps."""
    ours = random_params()
    theirs = [param.detach().clone().requires_grad_() for param in ours]
    settings = {"lr": 1e-2, "betas": (beta1, 0.95), "weight_decay": 0.1}
    optimizer = AdamATan2(ours, **settings)
    other = ScaledAdamAtan2(theirs, a=1.0, b=1.0, **settings)
    for mine, its in zip(ours, theirs, strict=True):
        optimizer.state[mine]["step"] += steps_before
        zeros = {"exp_avg": torch.zeros_like(its), "exp_avg_sq": torch.zeros_like(its)}
        other.state[its] = {"steps": steps_before, **zeros}
    for step in range(6):
        draw_gradients(ours, step)
        for mine, its in zip(ours, theirs, strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch_elements", [1, 20])
def test_how_parameters_are_batched_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, batch_elements: int
) -> None:
    outcomes = []
    for limit in (None, batch_elements):
        if limit is not None:
            monkeypatch.setattr(training.adam_atan2, "BATCH_ELEMENTS", limit)
        torch.manual_seed(0)
        params = random_params()
        optimizer = AdamATan2(params, lr=1e-2, ema=0.9)
        for step in range(5):
            draw_gradients(params, step)
            optimizer.step()
        outcomes.append((params, [optimizer.state[param] for param in params]))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=0, rtol=0)


def test_a_batch_holds_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.adam_atan2, "BATCH_ELEMENTS", 20)
    sizes: list[list[int]] = []
    update = AdamATan2._update

    def counted(self: AdamATan2, params: list[Tensor], states: list, group: dict) -> None:
        sizes.append([param.numel() for param in params])
        update(self, params, states, group)

    monkeypatch.setattr(AdamATan2, "_update", counted)
    params = random_params()
    for param in params:
        param.grad = torch.ones_like(param)
    AdamATan2(params, lr=1e-2).step()
    assert sizes == [[24], [5, 1, 12], [7]]  # one that is larger than a batch goes alone


def test_scaling_all_gradients_changes_nothing() -> None:
    outcomes = []
    for scale in (1.0, 2.0**-20):
        torch.manual_seed(0)
        params = random_params()
        optimizer = AdamATan2(params, lr=1e-2)
        for step in range(3):
            draw_gradients(params, step)
            for param in params:
                param.grad = None if param.grad is None else param.grad * scale
            optimizer.step()
        outcomes.append(params)
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-8, rtol=1e-6)


def test_a_step_without_any_gradient_is_refused() -> None:
    optimizer = AdamATan2(random_params(), lr=1e-2)
    with pytest.raises(AssertionError, match=r"no parameter has a gradient; was reshard\(\)"):
        optimizer.step()


@pytest.fixture
def alone() -> Iterator[World]:
    yield World(rank=0, size=1, device=torch.device("cpu"))
    stop_world()


def test_state_of_sharded_parameters_equals_that_of_plain_ones(alone: World) -> None:
    inputs, outcomes = torch.randn(4, 8).bfloat16(), []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
        if is_sharded:
            shard_model(model, alone, torch.bfloat16)
        optimizer = AdamATan2(model.parameters(), lr=1e-2, ema=0.9)
        for _ in range(3):
            # what sharding does to the weights: a compute copy in bf16, gradients back in fp32
            copies = {name: p.bfloat16() for name, p in model.named_parameters()}
            outputs = model(inputs) if is_sharded else functional_call(model, copies, (inputs,))
            outputs.square().sum().backward()
            reshard(model)
            optimizer.step()
            optimizer.zero_grad()
        state = {name: {"param": p, **optimizer.state[p]} for name, p in model.named_parameters()}
        outcomes.append(state)
    plain, sharded = outcomes
    for name, tensors in sharded.items():
        for kind, tensor in tensors.items():
            assert isinstance(tensor, DTensor) == (kind != "step"), (name, kind)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert whole.dtype == torch.float32
            torch.testing.assert_close(whole, plain[name][kind], atol=0, rtol=0)
