"""A step split into micro-batches equals the whole one; a bad loss never reaches the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net_cases import NETS, build, random_row
from option_cases import net_with

from data_io.row_planning import RowPacking
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from dataset_new import PrefixLMDataset
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.compiling import CompileMode
from training.distributed import World
from training.step import accumulate_gradients, train_step
from training.step_check import BadStepError, StepCheck

RECOMPUTED = ("block", "attention")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SampledData:
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(1, 9, (2, 50), generator=generator).numpy()
    folder = tmp_path_factory.mktemp("sampled") / "data"
    with SampledWriter(folder, TokenizerInfo(vocab_size=200), max_seq_len=20) as writer:
        tokens = torch.randint(0, 200, (int(lens.sum()),), generator=generator).numpy()
        ends = lens.T.ravel().cumsum()
        starts = (writer.add_tokens(tokens) + ends - lens.T.ravel()).reshape(-1, 2).T
        writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))
    return SampledData.open(folder)


def packing(micro_batch_size: int | None) -> RowPacking:
    return RowPacking(
        96, 1, drop_last_batch=False, target_only=True, micro_batch_size=micro_batch_size
    )


def gradients(model: LanguageModel) -> dict[str, torch.Tensor | None]:
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("label", "recomputed", "compiled"),
    [
        *((label, "none", "none") for label in NETS),
        *((label, part, "none") for label in ("hrm", "transformer") for part in RECOMPUTED),
        ("hrm", "none", "block"),
        pytest.param("hrm", "none", "stack", marks=pytest.mark.slow),
        pytest.param("hrm", "none", "step", marks=pytest.mark.slow),
        ("transformer", "none", "step"),
    ],
)
def test_micro_batches_add_up_to_the_whole_step(
    label: str, recomputed: Any, compiled: CompileMode, data: SampledData
) -> None:
    expected = parts_add_up(net_with(NETS[label], recomputed=recomputed, compiled=compiled), data)
    if (recomputed, compiled) != ("none", "none"):
        torch.testing.assert_close(
            expected, parts_add_up(net_with(NETS[label]), data), atol=1e-6, rtol=1e-5
        )


def parts_add_up(model: LanguageModel, data: SampledData) -> dict[str, torch.Tensor | None]:
    """Requires of the micro-batches of a row what the row itself gives; its gradients."""
    (whole, *_) = PrefixLMDataset(data, packing(None), num_slots=64, epoch=0)
    parts = list(PrefixLMDataset(data, packing(40), num_slots=64, epoch=0))[:3]
    assert {part.num_micro for part in parts} == {3}
    divisor = float(whole.global_num_scored)
    sums = accumulate_gradients(model, [whole], divisor, None)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    split_sums = accumulate_gradients(model, parts, divisor, None)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(split_sums.loss, sums.loss, atol=0, rtol=1e-6)
    for name in ("correct_tokens", "scored_tokens", "correct_sequences", "scored_sequences"):
        assert getattr(split_sums, name) == getattr(sums, name), name
    return expected


def test_a_micro_batch_of_padding_alone_changes_nothing(data: SampledData) -> None:
    model = build(NETS["hrm"])
    batch = next(iter(PrefixLMDataset(data, packing(None), num_slots=64, epoch=0)))
    empty = random_row([], [], num_padding=96)
    padding = type(batch)(
        tokens=empty.tokens.int(),
        labels=torch.full((96,), -100, dtype=torch.int32),
        positions=empty.positions.int(),
        layout=empty.layout,
        indices=torch.full((64,), -1),
        num_scored=0,
        global_num_scored=batch.global_num_scored,
        global_num_tokens=batch.global_num_tokens,
        next_cursor=batch.next_cursor,
    )
    accumulate_gradients(model, [batch], 10.0, None)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    accumulate_gradients(model, [batch, padding], 10.0, None)
    for name, gradient in gradients(model).items():
        assert gradient is not None and torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    bad: float, data: SampledData
) -> None:
    model = build(NETS["transformer"])
    optimizer = AdamATan2(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = bad
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = next(iter(PrefixLMDataset(data, packing(None), num_slots=64, epoch=0)))
    with pytest.raises(
        BadStepError, match=r"loss of 1 of 1 ranks is not finite \(rank 0: "
    ) as found:
        train_step(model, optimizer, [batch], 10.0, None, StepCheck(ALONE))
    assert found.value.examples == [batch.indices[batch.indices >= 0].tolist()]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0, equal_nan=True)
    assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.mark.parametrize(("is_compiled", "rows"), [(False, 32), (True, 96)])
def test_rows_of_padding_are_computed_by_compiled_code_alone(
    is_compiled: bool, rows: int, monkeypatch: pytest.MonkeyPatch, data: SampledData
) -> None:
    model = build(NETS["transformer"])
    if is_compiled:
        model.lm_head.compile()  # compiles when it is called, which the loss does not do
    (*_, last) = PrefixLMDataset(data, packing(None), num_slots=64, epoch=0)
    assert (len(last.tokens), -(-int(last.layout.num_tokens) // 16) * 16) == (96, 32)
    given: list[int] = []
    forward = model.forward

    def watched(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(len(tokens))
        return forward(tokens, *others)

    monkeypatch.setattr(model, "forward", watched)
    accumulate_gradients(model, [last], 10.0, None)
    assert given == [rows]
