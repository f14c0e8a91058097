"""The chunked loss equals plain cross-entropy, and never holds the logits of a whole row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.loss
from models.batch import IGNORE_LABEL, PackedLayout
from models.loss import StepSums, next_token_sums

V, D = 32, 8


@dataclass(frozen=True)
class Case:
    """A head, hidden states that want a gradient, and labels for sequences in a row."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    layout: PackedLayout

    def sums(self) -> StepSums:
        return next_token_sums(
            self.hidden,
            self.weight,
            self.labels,
            self.layout,
            num_scored=int((self.labels != IGNORE_LABEL).sum()),
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def make_case(
    seq_lens: tuple[int, ...] = (7, 1, 12, 4, 9),
    *,
    num_padding: int = 3,
    share_scored: float = 0.6,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random labels, of which about half are what the head would say."""
    num_tokens = sum(seq_lens)
    lens = torch.tensor(seq_lens)
    layout = PackedLayout.from_lengths(lens, torch.zeros_like(lens), len(seq_lens) + 4)
    hidden = torch.randn(num_tokens + num_padding, D).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    likely = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.rand(len(hidden)) < 0.5, likely, torch.randint(V, (len(hidden),)))
    labels[torch.rand(len(labels)) >= share_scored] = IGNORE_LABEL
    labels[num_tokens:] = IGNORE_LABEL
    return Case(hidden, weight, labels.int(), layout)


def plain_loss(case: Case) -> Tensor:
    logits = case.hidden.float() @ case.weight.float().T
    return F.cross_entropy(logits, case.labels.long(), ignore_index=IGNORE_LABEL, reduction="sum")


def plain_counts(case: Case) -> list[int]:
    """Correct and scored tokens, correct and scored sequences."""
    is_scored = case.labels != IGNORE_LABEL
    is_correct = is_scored & ((case.hidden @ case.weight.T).argmax(-1) == case.labels)
    bounds = case.layout.cu_seqlens.tolist()
    pairs = [
        (int(is_correct[start:end].sum()), int(is_scored[start:end].sum()))
        for start, end in pairwise(bounds)
    ]
    return [
        sum(correct for correct, _ in pairs),
        sum(scored for _, scored in pairs),
        sum(correct == scored > 0 for correct, scored in pairs),
        sum(scored > 0 for _, scored in pairs),
    ]


def counts(sums: StepSums) -> list[int]:
    fields = (sums.correct_tokens, sums.scored_tokens)
    return [int(field) for field in (*fields, sums.correct_sequences, sums.scored_sequences)]


def set_chunk(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(models.loss, "CHUNK_LOGITS", num_rows * V)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 20, 100])
@pytest.mark.parametrize("share_scored", [0.2, 0.6, 1.0])
def test_chunked_loss_equals_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, share_scored: float
) -> None:
    set_chunk(monkeypatch, chunk_rows)
    case = make_case(share_scored=share_scored)
    sums, expected = case.sums(), plain_loss(case)
    torch.testing.assert_close(sums.loss, expected, atol=1e-5, rtol=1e-6)
    # scaled, as a step does it
    ours, plain = case.gradients(sums.loss / 7), case.gradients(expected / 7)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_a_chunk_boundary_on_the_last_scored_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(share_scored=1.0)
    expected = plain_loss(case)
    gradients = case.gradients(expected)
    num_scored = int((case.labels != IGNORE_LABEL).sum())
    for chunk_rows in (num_scored - 1, num_scored, num_scored + 1):
        set_chunk(monkeypatch, chunk_rows)
        sums = case.sums()
        torch.testing.assert_close(sums.loss, expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(case.gradients(sums.loss), gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share_scored", [0.0, 0.1, 0.5, 1.0])
def test_counts_are_those_of_tokens_and_whole_sequences(share_scored: float) -> None:
    for _ in range(10):
        case = make_case((3, 1, 2, 1, 5, 2), share_scored=share_scored)
        assert counts(case.sums()) == plain_counts(case)


def test_no_scored_rows_give_a_loss_of_zero_and_zero_gradients() -> None:
    case = make_case(share_scored=0.0)
    sums = case.sums()
    assert float(sums.loss.detach()) == 0.0 and counts(sums) == [0, 0, 0, 0]
    assert all(bool((gradient == 0).all()) for gradient in case.gradients(sums.loss))


def test_bf16_agrees_with_fp32_as_far_as_bf16_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, 3)
    case = make_case(dtype=torch.bfloat16)
    sums, expected = case.sums(), plain_loss(case)
    assert sums.loss.dtype == torch.float32
    torch.testing.assert_close(sums.loss, expected, rtol=5e-3, atol=0)
    for ours, plain in zip(case.gradients(sums.loss), case.gradients(expected), strict=True):
        assert ours.dtype == torch.bfloat16
        distance = (ours - plain).float().norm() / plain.float().norm()
        assert float(distance) < 0.01


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_a_gradient_to_one_side_alone(wanted: str) -> None:
    case = make_case()
    to_hidden, to_weight = case.gradients(case.sums().loss)
    (case.hidden if wanted == "weight" else case.weight).requires_grad_(False)
    (alone,) = torch.autograd.grad(case.sums().loss, getattr(case, wanted))
    both = to_hidden if wanted == "hidden" else to_weight
    torch.testing.assert_close(alone, both, atol=0, rtol=0)


def test_sums_add_up() -> None:
    first, second = make_case().sums(), make_case((4, 4)).sums()
    total = first + second
    assert counts(total) == [a + b for a, b in zip(counts(first), counts(second), strict=True)]
    torch.testing.assert_close(total.loss, first.loss + second.loss)
    assert total.loss.requires_grad and not total.detach().loss.requires_grad


class RecordedOps(TorchDispatchMode):
    """Counts matrix products, and remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.num_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


def test_the_logits_of_a_row_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_rows = 16
    set_chunk(monkeypatch, chunk_rows)
    case = make_case((100, 156), share_scored=1.0)
    with RecordedOps() as recorded:
        case.gradients(case.sums().loss)
    assert recorded.largest == max(chunk_rows * V, len(case.hidden) * D)
    assert recorded.largest < len(case.hidden) * V


def test_gradients_are_not_computed_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk(monkeypatch, 16)
    case = make_case((64,), num_padding=0, share_scored=1.0)
    with torch.no_grad(), RecordedOps() as recorded:
        sums = case.sums()
    assert recorded.num_products == 4  # the logits of each chunk
    torch.testing.assert_close(sums.loss, plain_loss(case).detach())
