"""Packed weights give the same answers, where they are faster and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from asking_cases import VOCAB_SIZE, write_run
from net_cases import NETS, build
from torch import Tensor

from inference import packed_weights
from inference.packed_weights import can_be_packed, open_for_answers, pack_weights
from models.language_model import LanguageModel
from models.linear import linear, packed
from simple_inference_engine import InferenceEngine, ModelOptions

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)
PROMPTS = [list(range(1, length)) for length in (3, 9, 5, 20)]


def fixed_model(net: str) -> LanguageModel:
    torch.manual_seed(3)
    return build(NETS[net], VOCAB_SIZE).requires_grad_(False).eval()


def engine(model: LanguageModel) -> InferenceEngine:
    return InferenceEngine(model, max_context=48, max_rows=3)


def answers(model: LanguageModel) -> list[tuple[int, ...]]:
    asked = engine(model).generate_ids(PROMPTS, stop_ids=(), max_new_tokens=8)
    return [answer.token_ids for answer in sorted(asked, key=lambda answer: answer.index)]


def logprobs(model: LanguageModel) -> Tensor:
    pairs = [(prompt, [7, 8]) for prompt in PROMPTS]
    return torch.tensor([score.logprobs for score in engine(model).score_ids(pairs)])


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (80, 16), (3, 1, 16)])
def test_a_packed_product_is_the_plain_one(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(24, 16)
    torch.testing.assert_close(linear(x, packed(weight)), x @ weight.T, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_rows_that_lie_apart_are_read_rightly() -> None:
    x, weight = torch.randn(16, 40).T[::2], torch.randn(24, 16)
    torch.testing.assert_close(linear(x, packed(weight)), x @ weight.T, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("net", NETS)
def test_answers_and_scores_of_every_net_stay(net: str) -> None:
    plain, in_layout = fixed_model(net), fixed_model(net)
    pack_weights(in_layout)
    assert all(each.is_mkldnn for name, each in in_layout.named_parameters() if "_proj" in name)
    assert answers(in_layout) == answers(plain)
    torch.testing.assert_close(logprobs(in_layout), logprobs(plain), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_depth_can_be_changed_afterwards() -> None:
    model = fixed_model("hrm")
    expected = answers(engine(model).at_depth(H_cycles=1).model)
    pack_weights(model)
    assert answers(engine(model).at_depth(H_cycles=1).model) == expected


@needs_onednn
def test_weights_are_packed_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModelOptions(ckpt_path=write_run(tmp_path / "run"), device="cpu")
    for gain, is_packed in ((1.5, True), (1.03, False)):
        monkeypatch.setattr(packed_weights, "packing_gain", lambda width, gain=gain: gain)
        opened = open_for_answers(options)
        assert any(each.is_mkldnn for each in opened.model.parameters()) == is_packed
        assert ("weights packed for oneDNN (1.5 times faster)" in opened.description) == is_packed
    compiled = open_for_answers(options.model_copy(update={"decode": "compiled"}))
    assert "weights packed" not in compiled.description


def test_weights_that_change_or_are_not_fp32_stay_as_they_are() -> None:
    model = fixed_model("hrm")
    assert can_be_packed(model)
    assert not can_be_packed(model.requires_grad_(True))
    assert not can_be_packed(model.requires_grad_(False).to(torch.bfloat16))
