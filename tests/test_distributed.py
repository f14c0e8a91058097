"""One process: threads and devices are chosen by rule, and bf16 keeps its master weights in fp32.

Several processes are the subject of tests/test_two_ranks.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from net_cases import NETS, Row, build, random_row
from run_cases import ALONE, whole
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.batch import IGNORE_LABEL
from models.language_model import LanguageModel
from models.layers import Rope
from models.loss import StepSums, next_token_sums
from models.transformer import Block
from training.adam_atan2 import AdamATan2
from training.distributed import (
    World,
    device_note,
    pick_device,
    reshard,
    set_threads,
    shard_model,
    start_world,
    stop_world,
)


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    stop_world()


@pytest.mark.parametrize(
    ("asked", "omp", "processes", "cores", "expected", "reason"),
    [
        (3, "2", None, 8, 3, "asked for"),
        (None, "2", None, 8, 2, "OMP_NUM_THREADS"),
        (None, "1", "4", 8, 1, "OMP_NUM_THREADS"),
        (None, None, None, 8, 7, "8 cores, 1 processes, one core left for data"),
        (None, "", None, 8, 7, "8 cores, 1 processes, one core left for data"),
        (None, None, "3", 8, 2, "8 cores, 3 processes, one core left for data"),
        (None, None, None, 1, 1, "1 cores, 1 processes, one core left for data"),
        (None, None, "16", 8, 1, "8 cores, 16 processes, one core left for data"),
    ],
)
def test_threads_are_set_by_rule(
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    omp: str | None,
    processes: str | None,
    cores: int,
    expected: int,
    reason: str,
) -> None:
    for name, value in (("OMP_NUM_THREADS", omp), ("LOCAL_WORLD_SIZE", processes)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert set_threads(asked, {}, 1) == (expected, reason)
    assert torch.get_num_threads() == expected


def test_threads_of_before_are_used_again_with_as_many_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    recorded = {"threads": 3, "processes": 2}
    assert set_threads(None, recorded, 2) == (3, "as before")
    assert "left for data" in set_threads(None, recorded, 1)[1]
    assert set_threads(1, recorded, 2)[1] == "asked for; it was 3: the run is no longer bit-equal"


def test_denormal_numbers_are_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    assert smallest / 2 > 0
    set_threads(1, {}, 1)
    assert smallest / 2 == 0


def have(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)


@pytest.mark.parametrize(
    ("there", "expected"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_the_best_device_is_picked(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], expected: str
) -> None:
    have(monkeypatch, *there)
    assert pick_device("auto").type == expected
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("there", "wanted", "message"),
    [
        ((), "cuda", "device=cuda is not available here; this machine has cpu$"),
        (("mps",), "cuda", "device=cuda is not available here; this machine has mps, cpu$"),
        (("cuda",), "mps", "device=mps is not available here; this machine has cuda, cpu$"),
        ((), "gpu", "device=gpu is not available here; this machine has cpu$"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], wanted: str, message: str
) -> None:
    have(monkeypatch, *there)
    with pytest.raises(ValueError, match=message):
        pick_device(wanted)


def test_untested_devices_are_called_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_note(torch.device("cpu")) == "CPU"
    assert "untested" in device_note(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some card")
    assert device_note(torch.device("cuda")) == "Some card (CUDA: untested)"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert device_note(torch.device("cuda")) == "Some card (ROCm: untested)"


def test_without_torchrun_the_world_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    world = start_world("cpu")
    assert world == World(rank=0, size=1, device=torch.device("cpu")) and world.is_main
    assert not dist.is_initialized()
    stop_world()


def test_several_processes_cannot_share_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "mps")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="cannot share an MPS device; use device=cpu"):
        start_world("auto")


def test_collectives_of_one_process_need_no_group() -> None:
    values = torch.tensor([1.5, 2.0])
    assert torch.equal(ALONE.sum(values), values)
    assert ALONE.broadcast("é") == "é" and ALONE.broadcast("") == ""
    ALONE.barrier()
    assert not dist.is_initialized()


def test_one_process_in_fp32_keeps_the_plain_module() -> None:
    model = build(NETS["hrm"])
    shard_model(model, ALONE, torch.float32)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert not any(isinstance(param, DTensor) for param in model.parameters())
    assert not dist.is_initialized()
    reshard(model)


def tiny_row() -> Row:
    return random_row((5, 9, 3, 20), (7, 4, 12, 9), num_padding=3)


def loss_sums(model: LanguageModel, row: Row, backprop_steps: int | None = None) -> StepSums:
    hidden = model(row.tokens, row.positions, row.layout, backprop_steps)
    num_tokens = int(row.layout.num_tokens)
    labels = row.tokens.roll(-1)
    labels[num_tokens:] = IGNORE_LABEL
    head = model.lm_head.weight
    return next_token_sums(hidden, head, labels, row.layout, num_scored=num_tokens)


def sharded_copy(model: LanguageModel) -> LanguageModel:
    copy = deepcopy(model)
    shard_model(copy, ALONE, torch.bfloat16)
    return copy


@pytest.mark.parametrize("net", ["hrm", "transformer"])
def test_one_process_in_bf16_wraps_the_root_alone(net: str) -> None:
    plain = build(NETS[net])
    model = sharded_copy(plain)
    assert [m for m in model.modules() if isinstance(m, FSDPModule)] == [model]
    for (name, param), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(param, DTensor) and param.dtype == torch.float32, name
        assert torch.equal(param.full_tensor(), before)
    for buffer, before in zip(model.buffers(), plain.buffers(), strict=True):
        assert buffer.dtype == torch.bfloat16 and torch.equal(buffer, before)


@pytest.mark.parametrize("net", ["hrm", "transformer"])
def test_bf16_computes_what_a_model_cast_to_bf16_does(net: str) -> None:
    plain, row = build(NETS[net]), tiny_row()
    model = sharded_copy(plain)
    found = loss_sums(model, row).loss
    assert torch.equal(found, loss_sums(deepcopy(plain).bfloat16(), row).loss)
    torch.testing.assert_close(found, loss_sums(plain, row).loss, rtol=2e-3, atol=0)


def test_bf16_leaves_rotary_tables_in_fp32() -> None:
    model, seen = sharded_copy(build(NETS["hrm"])), []

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x, rope, *_ = inputs
        assert isinstance(rope, Rope)
        seen.append((x.dtype, rope.cos.dtype, rope.sin.dtype))

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(look)
    loss_sums(model, tiny_row())
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def train(model: LanguageModel, row: Row, steps: int) -> tuple[AdamATan2, list[float]]:
    num_tokens = int(row.layout.num_tokens)
    optimizer, losses = AdamATan2(model.parameters(), lr=3e-4, ema=0.9), []
    for _ in range(steps):
        sums = loss_sums(model, row)
        (sums.loss / num_tokens).backward()
        reshard(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sums.loss.detach()) / num_tokens)
    return optimizer, losses


def test_training_in_bf16_keeps_fp32_weights_and_stays_close_to_fp32() -> None:
    plain, row = build(NETS["hrm"]), tiny_row()
    model = sharded_copy(plain)
    buffers = [buffer.clone() for buffer in model.buffers()]
    optimizer, losses = train(model, row, 5)
    _, expected = train(plain, row, 5)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses[-1] < losses[0] - 0.05
    changed = 0
    for param in model.parameters():
        state = optimizer.state[param]
        for tensor in (param, state["exp_avg"], state["exp_avg_sq"], state["param_ema"]):
            assert tensor.dtype == torch.float32
        weights = whole(param)
        changed += int((weights != weights.bfloat16().float()).sum())
    assert changed > 0.9 * sum(param.numel() for param in plain.parameters())
    assert len(buffers) == 1  # z_L_init
    torch.testing.assert_close(list(model.buffers()), buffers, atol=0, rtol=0)


@pytest.mark.parametrize("backprop_steps", [1, 2, 5])
def test_bf16_gradients_reach_as_far_as_those_of_the_plain_module(backprop_steps: int) -> None:
    plain, row = build(NETS["hrm"]), tiny_row()
    model = sharded_copy(plain)
    reached = []
    for each in (plain, model):
        loss_sums(each, row, backprop_steps).loss.backward()
        reshard(each)
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        reached.append(gradients.keys())
    assert reached[0] == reached[1]
    assert ("model.embed_tokens.weight" in reached[1]) == (backprop_steps == 5)


def test_resharding_after_a_pass_without_gradients_gives_the_parameters_back() -> None:
    """Else the model would hand its compute copies to whoever asks for parameters next."""
    model, row = sharded_copy(build(NETS["hrm"])), tiny_row()
    params = list(model.parameters())
    losses = []
    for steps in (3, 0):
        with torch.no_grad():
            losses.append(float(loss_sums(model, row).loss))
        reshard(model)
        assert all(param is kept for param, kept in zip(model.parameters(), params, strict=True))
        train(model, row, steps)
    assert losses[1] < losses[0]
