"""The written-out block is the block of the layers, and takes its place only where it may."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unittest.mock import patch

import numba
import pytest
import torch
from attention_cases import AWKWARD, LAYOUTS, Lengths, packed
from hypothesis import given, settings
from torch import Tensor

from models import cpu_block
from models.attention import in_place, sdpa
from models.attention.dense import DenseAttention
from models.attention.interface import PackedContext
from models.layers import Rope
from models.linear import set_linear_kernel
from models.lora import AdaptedLinear, LoraConfig
from models.transformer import Block, StackConfig

WIDTH, HEADS = 32, 2
KERNELS = [
    "mkl",
    pytest.param(
        "onednn",
        marks=pytest.mark.skipif(
            not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
        ),
    ),
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with patch("models.linear.MIN_ROWS", 1):
        set_linear_kernel(request.param)
        yield request.param
    set_linear_kernel("mkl")


def block(**changes: object) -> Block:
    torch.manual_seed(0)
    shape = {"n_layers": 1, "hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 48}
    return Block(StackConfig.model_validate({**shape, **changes}))


def inputs(lengths: Lengths, padding: int) -> tuple[Tensor, Tensor, Rope, PackedContext]:
    """Rows, gradients of what becomes of them (none in padding), and where they are."""
    layout, num_rows = packed(lengths, padding)
    positions = [torch.arange(sum(each)) for each in lengths]
    rope = Rope.at(torch.cat([*positions, torch.zeros(padding)]), WIDTH // HEADS, 1e4)
    torch.manual_seed(1)
    rows, grads = torch.randn(2, num_rows, WIDTH)
    grads[int(layout.num_tokens) :] = 0.0
    plan = sdpa.SdpaAttention().prepare(layout, num_rows)
    return rows, grads, rope, PackedContext(plan)


def outcome(
    tested: Block, rows: Tensor, grads: Tensor, rope: Rope | None, context: PackedContext
) -> list[Tensor]:
    """What a block makes of the rows, and the gradients to them and to its weights."""
    rows = rows.clone().requires_grad_()
    result = tested(rows, rope, context, 0)
    wanted = [weight for weight in tested.parameters() if weight.requires_grad]
    return [result, *torch.autograd.grad(result, [rows, *wanted], grads)]


def check(lengths: Lengths, padding: int, tested: Block, *, rotates: bool = True) -> None:
    rows, grads, rope, context = inputs(lengths, padding)
    given_rope = rope if rotates else None
    with patch.object(cpu_block, "is_possible", return_value=False):
        by_layers = outcome(tested, rows, grads, given_rope, context)
    found = outcome(tested, rows, grads, given_rope, context)
    torch.testing.assert_close(found, by_layers, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", AWKWARD)
def test_it_is_the_block_of_the_layers_on_awkward_rows(kernel: str, case: str) -> None:
    check(*AWKWARD[case], block())


@settings(max_examples=15, deadline=None)
@given(drawn=LAYOUTS)
def test_long_sequences_are_computed_by_themselves(drawn: tuple[Lengths, int]) -> None:
    with patch.object(in_place, "LONG_FROM", 12):
        check(*drawn, block())


def test_it_needs_no_positions() -> None:
    check([(3, 4), (5, 2)], 2, block(pos_emb_type="none"), rotates=False)


@pytest.mark.parametrize("frozen", [("attn.gqkv_proj", "mlp.gate_up_proj"), ("attn.o_proj",)])
def test_frozen_weights_get_no_gradient(frozen: tuple[str, ...]) -> None:
    tested = block()
    for name in frozen:
        tested.get_submodule(name).requires_grad_(False)
    check([(3, 4), (5, 2)], 2, tested)


def test_second_derivatives_are_refused_not_wrong() -> None:
    rows, _, rope, context = inputs([(3, 4), (5, 2)], 0)
    rows.requires_grad_()
    result = block()(rows, rope, context, 0)
    (gradient,) = torch.autograd.grad(result.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_padding_gets_no_gradient_and_gives_none() -> None:
    rows, grads, rope, context = inputs([(3, 4), (5, 2)], 3)
    found = outcome(block(), rows, grads, rope, context)
    rows[-3:] = 7.0
    again = outcome(block(), rows, grads, rope, context)
    assert not found[1][-3:].any()
    for one, other in zip(found[1:], again[1:], strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def asks_again() -> Iterator[None]:
    """Whether there are kernels is asked in the test, and once more after it."""
    cpu_block.why_no_kernels.cache_clear()
    yield
    cpu_block.why_no_kernels.cache_clear()


@pytest.mark.parametrize(
    "reason", ["post-norm", "bfloat16", "adapter", "another backend", "no numba", "no jit", None]
)
@pytest.mark.usefixtures("asks_again")
def test_it_takes_the_place_of_the_layers_only_where_it_may(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _, rope, context = inputs([(3, 4), (5, 2)], 0)
    tested = block(norm_type="post" if reason == "post-norm" else "pre")
    if reason == "adapter":
        config = LoraConfig(rank=2, targets=["o_proj"])
        tested.attn.o_proj = AdaptedLinear(tested.attn.o_proj, config, 1)
    if reason == "bfloat16":
        rows, tested = rows.bfloat16(), tested.bfloat16()
    if reason == "no numba":
        monkeypatch.setitem(sys.modules, "models.cpu_attention", None)
    if reason == "no jit":
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    if reason == "another backend":
        context = PackedContext(DenseAttention().prepare(packed([(3, 4), (5, 2)], 0)[0], len(rows)))
    with patch.object(cpu_block, "attention_half", wraps=cpu_block.attention_half) as written_out:
        tested(rows, rope, context, 0)
    assert written_out.called == (reason is None)
