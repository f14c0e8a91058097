"""Attention of short sequences is the dense one, with its gradients, whatever lies beside them."""

from __future__ import annotations

import pytest
import torch
from attention_cases import AWKWARD, LAYOUTS, Lengths, packed
from hypothesis import given, settings
from torch import Tensor

from models import cpu_attention
from models.attention import in_place, sdpa
from models.attention.dense import DenseAttention

TOLERANCE = 1e-6  # relative, of norms


def outcome(lengths: Lengths, padding: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What is mixed, and the gradients of query, key and value."""
    layout, num_rows = packed(lengths, padding)
    gqkv, grads = rows_of(num_rows, shape)
    plan = sdpa.SdpaAttention().prepare(layout, num_rows)
    mixed, kept = plan.mix(gqkv)
    into = torch.full_like(gqkv, float("nan"))
    plan.mix_backward(grads, gqkv, mixed, kept, into)
    assert into[:, 0].isnan().all()  # the gate's part is not touched
    return mixed, into[:, 1:]


def rows_of(num_rows: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(num_rows, 4, *shape), torch.randn(num_rows, *shape)


def dense(lengths: Lengths, padding: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    layout, num_rows = packed(lengths, padding)
    gqkv, grads = rows_of(num_rows, shape)
    asked = [each.double().requires_grad_() for each in gqkv.unbind(1)[1:]]
    mixed = DenseAttention().prepare(layout, num_rows).attend(*asked)
    grads[int(layout.num_tokens) :] = 0.0
    return mixed.detach(), torch.stack(torch.autograd.grad(mixed, asked, grads.double()), 1)


def check(lengths: Lengths, padding: int, shape: tuple[int, int]) -> None:
    expected = dense(lengths, padding, shape)
    for found, exact in zip(outcome(lengths, padding, shape), expected, strict=True):
        assert float((found - exact).norm()) <= TOLERANCE * float(exact.norm())


@pytest.mark.parametrize("case", AWKWARD)
def test_it_is_the_dense_one_on_awkward_rows(case: str) -> None:
    check(*AWKWARD[case], shape=(2, 16))


@settings(max_examples=25, deadline=None)
@given(drawn=LAYOUTS)
def test_it_is_the_dense_one_on_any_row(drawn: tuple[Lengths, int]) -> None:
    check(*drawn, shape=(1, 12))


@pytest.mark.parametrize("shape", [(1, 2), (3, 8), (2, 16), (1, 40), (2, 64)])
def test_heads_may_have_any_size(shape: tuple[int, int]) -> None:
    check([(3, 4), (20, 13), (16, 0), (0, 16), (40, 31)], 3, shape)


def test_long_sequences_lie_beside_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "LONG_FROM", 12)
    check([(3, 4), (9, 7), (0, 14), (5, 1), (13, 0)], 2, (2, 16))


def test_neighbours_memory_and_threads_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    gqkv, grads = rows_of(40, (2, 16))
    sequences = torch.tensor([[0, 4, 9], [9, 0, 17], [26, 14, 14]])

    def found(start: int, table: Tensor, offset: int) -> list[Tensor]:
        moved = torch.empty(gqkv[start:].numel() + offset)[offset:].view_as(gqkv[start:])
        moved.copy_(gqkv[start:])
        mixed, into = torch.zeros_like(grads[start:]), torch.zeros_like(moved)
        softmax = cpu_attention.mix(moved, table, mixed)
        cpu_attention.mix_backward(grads[start:].contiguous(), moved, table, softmax, into)
        return [mixed, into]

    together = found(0, sequences, 0)
    monkeypatch.setattr(cpu_attention, "GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(together, found(0, sequences, 3), strict=True):
        assert torch.equal(one, other)
    alone = found(9, torch.tensor([[0, 0, 17]]), 1)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[9:26], other[:17])


def test_what_is_no_number_stays_visible_in_its_sequence_alone() -> None:
    layout, num_rows = packed([(3, 4), (5, 2)], 0)
    gqkv, grads = rows_of(num_rows, (1, 16))
    gqkv[8, 2, 0, 3] = float("nan")  # a key of the second sequence's prefix
    plan = sdpa.SdpaAttention().prepare(layout, num_rows)
    mixed, kept = plan.mix(gqkv)
    into = torch.zeros_like(gqkv)
    plan.mix_backward(grads, gqkv, mixed, kept, into)
    for each in (mixed, into):
        assert each[:7].isfinite().all()
        assert each[7:].isnan().any()
    assert mixed[7:].isnan().all()


def test_rows_that_the_plan_does_not_know_are_refused_before_memory_is_touched() -> None:
    layout, num_rows = packed([(3, 4), (5, 2)], 0)
    gqkv, _ = rows_of(num_rows - 1, (1, 16))
    with pytest.raises(AssertionError):
        sdpa.SdpaAttention().prepare(layout, num_rows).mix(gqkv)
    with pytest.raises(AssertionError):
        sdpa.SdpaAttention().prepare(layout, num_rows - 1).mix(gqkv)


def test_a_prefix_longer_than_its_sequence_is_refused() -> None:
    with pytest.raises(AssertionError):
        in_place.pieces_of([4, 3], [0, 4, 6])
