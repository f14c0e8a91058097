"""Every net computes what the original does, and a sequence never notices its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS, build, golden_net, random_row, read_case
from safetensors.torch import load_file
from torch import Tensor

from models.batch import PackedLayout
from models.language_model import LanguageModel
from models.loss import StepSums, next_token_sums
from training.export_format import parameter_name_from_reference

LOGITS_ATOL, GRADIENT_ATOL = 2e-5, 2e-6
PREFIX_LENS, CAUSAL_LENS = (5, 1, 9, 2, 17), (4, 0, 0, 20, 1)

all_nets = pytest.mark.parametrize("net", NETS)


def forward(
    model: LanguageModel, batch: dict[str, Tensor], num_seqs: int, backprop_steps: int | None
) -> tuple[Tensor, StepSums]:
    """Hidden states and sums of a golden batch."""
    prefix_lens, causal_lens = batch["prefix_lens"], batch["causal_lens"]
    layout = PackedLayout.from_lengths(
        prefix_lens[:num_seqs], causal_lens[:num_seqs], len(prefix_lens)
    )
    hidden = model(batch["inputs"], batch["position_ids"], layout, backprop_steps)
    num_scored = int((batch["labels"] >= 0).sum())
    weight = model.lm_head.weight
    return hidden, next_token_sums(hidden, weight, batch["labels"], layout, num_scored=num_scored)


def assert_gradients_equal(model: LanguageModel, expected: dict[str, Tensor]) -> None:
    """`expected` has every gradient that is not None, by our names."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=GRADIENT_ATOL, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_golden_net_has_the_original_logits(golden_nets: Path) -> None:
    case, model = read_case(golden_nets), golden_net(golden_nets)
    batch = load_file(golden_nets / case["files"]["batch"])
    with torch.no_grad():
        hidden, _ = forward(model, batch, case["scalars"]["numseqs"], None)
    expected = load_file(golden_nets / case["files"]["logits"])["logits"]
    torch.testing.assert_close(model.logits(hidden), expected, atol=LOGITS_ATOL, rtol=0)


def test_golden_net_has_the_original_loss_counts_and_gradients(golden_nets: Path) -> None:
    case, model = read_case(golden_nets), golden_net(golden_nets)
    batch = load_file(golden_nets / case["files"]["batch"])
    results: dict[str, dict[str, Any]] = case["results"]
    for steps, result in results.items():
        model.zero_grad(set_to_none=True)
        backprop_steps = int(steps) if steps.isdigit() else None
        _, sums = forward(model, batch, case["scalars"]["numseqs"], backprop_steps)
        loss = sums.loss / result["loss_divisor"]
        assert float(loss.detach()) == pytest.approx(result["loss_returned"], rel=2e-6)
        assert int(sums.correct_tokens) == result["token_correct"]
        assert int(sums.scored_tokens) == result["token_valid"]
        assert int(sums.correct_sequences) == result["exact_correct"]
        assert int(sums.scored_sequences) == result["exact_valid"]
        loss.backward()
        expected = load_file(golden_nets / result["file"])
        assert not expected.keys() & set(result["none_grads"])
        assert_gradients_equal(
            model, {parameter_name_from_reference(name): g for name, g in expected.items()}
        )


@all_nets
def test_a_sequence_alone_equals_itself_among_neighbours(net: str) -> None:
    model = build(NETS[net])
    row = random_row(PREFIX_LENS, CAUSAL_LENS, num_padding=7)
    with torch.no_grad():
        together = model(row.tokens, row.positions, row.layout)
        for index in range(len(PREFIX_LENS)):
            one = row.alone(index)
            alone = model(one.tokens, one.positions, one.layout)
            torch.testing.assert_close(alone, together[row.sequence(index)], atol=1e-5, rtol=0)


@all_nets
def test_padding_never_reaches_real_tokens(net: str) -> None:
    model = build(NETS[net])
    num_padding, num_real = 6, sum(PREFIX_LENS) + sum(CAUSAL_LENS)
    row = random_row(PREFIX_LENS, CAUSAL_LENS, num_padding=num_padding)
    tokens = row.tokens.clone()
    tokens[num_real:] = torch.arange(1, num_padding + 1)
    outcomes = []
    for changed in (row.tokens, tokens):
        model.zero_grad(set_to_none=True)
        hidden = model(changed, row.positions, row.layout)[:num_real]
        hidden.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outcomes.append((hidden.detach(), gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=0, rtol=0)


@pytest.mark.parametrize("net", [net for net in NETS if net.startswith("hrm")])
def test_without_backprop_steps_only_the_head_has_a_gradient(net: str) -> None:
    model = build(NETS[net])
    row = random_row((4, 3), (2, 5))
    hidden = model(row.tokens, row.positions, row.layout, backprop_steps=1)
    model.logits(hidden).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"lm_head.weight"}


def test_a_call_that_carries_no_gradient_changes_no_result() -> None:
    model = build(NETS["hrm"])
    row = random_row((4, 3), (2, 5))
    answers = [model(row.tokens, row.positions, row.layout, steps) for steps in (1, 2, 5, 8)]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=0, rtol=0)


def test_a_vocabulary_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=300 must be a positive multiple of 256"):
        build(NETS["ut"], vocab_size=300)
