"""Adapters: nothing at first, mergeable where they are shared, and one for each call otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, Row, build, random_row
from torch import Tensor

from models.language_model import LanguageModel
from models.linear import set_linear_kernel
from models.lora import (
    ALL_TARGETS,
    AdaptedLinear,
    LoraConfig,
    adapters_of,
    add_adapters,
    calls_by_stack,
    is_adapter,
    merged,
)
from models.loss import next_token_sums
from models.transformer import Block


@pytest.fixture(autouse=True)
def plain_products() -> None:
    set_linear_kernel("mkl")


def adapted(net: str, *, is_drawn: bool = True, **settings: Any) -> LanguageModel:
    """A tiny net with adapters that do something, if drawn."""
    torch.manual_seed(5)
    model = build(NETS[net])
    add_adapters(model, LoraConfig(rank=3, **settings))
    for name, param in model.named_parameters():
        param.requires_grad_(is_adapter(name))
        if is_drawn and name.endswith("lora_B"):
            torch.nn.init.normal_(param.data, std=0.03)
    return model


def hidden_of(model: LanguageModel, row: Row) -> Tensor:
    return model(row.tokens, row.positions, row.layout)


def row_of(seed: int = 3) -> Row:
    torch.manual_seed(seed)
    return random_row([5, 1, 7], [4, 6, 2], num_padding=3)


@pytest.mark.parametrize("per_cycle", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_fresh_adapters_change_nothing(net: str, per_cycle: bool) -> None:
    torch.manual_seed(5)
    plain = build(NETS[net])
    model = adapted(net, is_drawn=False, per_cycle=per_cycle)
    # The last bits are others: blocks with adapters are not computed by `models.cpu_block`.
    torch.testing.assert_close(
        hidden_of(model, row_of()), hidden_of(plain, row_of()), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("net", NETS)
def test_shared_adapters_merge_into_the_weights(net: str) -> None:
    model, plain = adapted(net), build(NETS[net])
    state = model.state_dict()
    for name, weight in plain.state_dict().items():
        names = adapters_of(name)
        if names[0] in state:
            weight.copy_(merged(state[name], *(state[each] for each in names), scale=16.0 / 3))
        else:
            weight.copy_(state[name])
    row = row_of()
    torch.testing.assert_close(hidden_of(model, row), hidden_of(plain, row), atol=1e-5, rtol=0.0)
    torch.manual_seed(5)
    untouched = build(NETS[net])  # the adapters do change what is computed
    assert not torch.allclose(hidden_of(model, row), hidden_of(untouched, row), atol=1e-2)


@pytest.mark.parametrize("target", ALL_TARGETS)
@pytest.mark.parametrize("net", ["hrm", "trm", "hrm post-norm", "ut"])
def test_each_call_has_its_own_adapter(net: str, target: str) -> None:
    """Equal adapters in all calls are a shared one; another one in a single call is not."""
    shared = adapted(net, targets=[target])
    own = adapted(net, targets=[target], per_cycle=True)
    calls = calls_by_stack(NETS[net])
    assert max(calls.values()) > 1
    for name, module in own.named_modules():
        if isinstance(module, AdaptedLinear):
            assert module.num_calls == next(n for stack, n in calls.items() if stack in name)
            other = shared.get_submodule(name)
            assert isinstance(other, AdaptedLinear)
            module.lora_A.data.copy_(other.lora_A.repeat(module.num_calls, 1))
            module.lora_B.data.copy_(other.lora_B.repeat(module.num_calls, 1))
    row = row_of()
    expected = hidden_of(shared, row)
    torch.testing.assert_close(hidden_of(own, row), expected, atol=1e-5, rtol=0.0)
    stack, count = max(calls.items(), key=lambda item: item[1])
    before = expected
    for call in range(count):
        for name, module in own.named_modules():
            if isinstance(module, AdaptedLinear) and stack in name:
                module.lora_B.data.chunk(count)[call].zero_()
        after = hidden_of(own, row)
        assert not torch.allclose(after, before, atol=1e-4), call
        before = after


@pytest.mark.parametrize("per_cycle", [False, True])
def test_decoding_agrees_with_a_whole_pass(per_cycle: bool) -> None:
    model = adapted("hrm", per_cycle=per_cycle).eval()
    torch.manual_seed(3)
    row = random_row([6], [4])
    with torch.no_grad():
        expected = hidden_of(model, row)
        cache = model.new_cache(1, 16)
        prompt = random_row([6], [0])
        prefix = model.prefill(
            row.tokens[:6], row.positions[:6], prompt.layout, cache, torch.zeros(3).long()
        )
        torch.testing.assert_close(prefix, expected[:6], atol=1e-5, rtol=0.0)
        for index in range(6, 10):
            found = model.decode(row.tokens[index : index + 1], cache)
            torch.testing.assert_close(found[0], expected[index], atol=1e-5, rtol=0.0)


def gradients(model: LanguageModel, row: Row) -> dict[str, Tensor]:
    hidden = hidden_of(model, row)
    labels = torch.where(torch.arange(len(row.tokens)) < 25, row.tokens, -100)  # padding has none
    num_scored = int((labels != -100).sum())
    sums = next_token_sums(hidden, model.lm_head.weight, labels, row.layout, num_scored=num_scored)
    sums.loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recomputed", ["block", "attention"])
@pytest.mark.parametrize("per_cycle", [False, True])
def test_gradients_survive_recomputed_activations(per_cycle: bool, recomputed: Any) -> None:
    row = row_of()
    expected = gradients(adapted("hrm", per_cycle=per_cycle), row)
    model = adapted("hrm", per_cycle=per_cycle)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = recomputed
    found = gradients(model, row)
    assert found.keys() == expected.keys() and all(map(is_adapter, found))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_calls_without_gradient_leave_their_adapter_alone() -> None:
    """bp 5 of hrm with 2 cycles of 3: both calls of H, and the last three of six of L."""
    found = gradients(adapted("hrm", per_cycle=True), row_of())
    for name, grad in found.items():
        parts = grad.chunk(6 if "L_module" in name else 2)
        learns = [bool(part.any()) for part in parts]
        assert learns == ([False] * 3 + [True] * 3 if "L_module" in name else [True] * 2), name


def test_targets_choose_the_maps() -> None:
    for targets in (["o_proj"], ["gqkv_proj", "down_proj"]):
        model = adapted("hrm", targets=targets)
        named = {name.split(".")[-2] for name, _ in model.named_parameters() if is_adapter(name)}
        assert named == set(targets)
    assert set(LoraConfig().targets) == set(ALL_TARGETS)
    with pytest.raises(ValueError, match="gqkv_proj"):
        LoraConfig.model_validate({"targets": ["lm_head"]})
    assert len(build(NETS["hrm"]).lm_head.weight) == VOCAB_SIZE
