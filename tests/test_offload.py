"""State in host memory makes the same steps, bit for bit, and is saved and loaded as any other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS, build
from run_cases import ALONE, TinyRun, run_config
from torch import Tensor
from torch.distributed.tensor import DTensor

import training.adam_atan2
from training.adam_atan2 import AdamATan2
from training.building import build_model, build_optimizer
from training.checkpoint import Progress, training_state
from training.distributed import shard_model, stop_world
from training.host_state import streamed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def left_world() -> Iterator[None]:
    yield
    stop_world()


def trained(state_device: torch.device | None, *, is_sharded: bool, **settings: Any) -> dict:
    """All tensors of a tiny net after some steps; a few parameters have no gradient at first."""
    torch.manual_seed(0)
    model = build(NETS["hrm"])
    if is_sharded:
        shard_model(model, ALONE, torch.bfloat16)
    optimizer = AdamATan2(model.parameters(), lr=1e-2, state_device=state_device, **settings)
    for step in range(4):
        for number, param in enumerate(model.parameters()):
            skips = step == 0 and number % 3 == 0
            param.grad = None if skips else param.detach().clone().mul_(torch.randn(()))
        optimizer.step()
    state = training_state(model, optimizer)
    sharded = {
        f"{folder}.{name}": isinstance(tensor, DTensor)
        for folder, tensors in state.items()
        for name, tensor in tensors.items()
        if "step." not in name and "z_L_init" not in name
    }
    assert set(sharded.values()) == {is_sharded}, sharded
    return {
        folder: {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in tensors.items()
        }
        for folder, tensors in state.items()
    }


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("batch_elements", [1, 20_000, 1 << 26])
def test_it_makes_the_same_steps(
    batch_elements: int, is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.adam_atan2, "BATCH_ELEMENTS", batch_elements)
    expected = trained(None, is_sharded=is_sharded, ema=0.9)
    found = trained(CPU, is_sharded=is_sharded, ema=0.9)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_it_does_so_without_momentum_and_without_an_average() -> None:
    settings = {"betas": (0.0, 0.95), "weight_decay": 0.0}
    expected, found = (trained(device, is_sharded=False, **settings) for device in (None, CPU))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert "ema" not in found and not any("exp_avg." in name for name in found["optimizer"])


def test_changes_are_written_back_and_two_batches_are_there_at_a_time() -> None:
    batches = [[{"exp_avg": torch.full((3,), float(number))}] for number in range(5)]
    arrived: list[weakref.ref[Tensor]] = []
    for number, copies in enumerate(streamed(batches, CPU)):
        copy = copies[0]["exp_avg"]
        assert torch.equal(copy, batches[number][0]["exp_avg"])
        assert copy.data_ptr() != batches[number][0]["exp_avg"].data_ptr()
        copy += 10
        assert float(batches[number][0]["exp_avg"][0]) == number  # not yet
        arrived.append(weakref.ref(copy))
        assert sum(each() is not None for each in arrived) <= 2
    assert [float(batch[0]["exp_avg"][0]) for batch in batches] == [10, 11, 12, 13, 14]
    assert list(streamed([], CPU)) == []


@pytest.mark.parametrize("saves_offloaded", [True, False])
def test_a_checkpoint_does_not_show_where_the_state_was(
    saves_offloaded: bool, tmp_path: Path
) -> None:
    kinds = [{"state_device": CPU}, {}] if saves_offloaded else [{}, {"state_device": CPU}]
    saved = TinyRun(tmp_path / "run", **kinds[0]).create()
    saved.step()
    saved.save("fsdp2_step_1", Progress(step=1))
    loaded = TinyRun(tmp_path / "run", seed=2, **kinds[1])
    (checkpoint,) = loaded.directory.checkpoints()
    checkpoint.restore(loaded.model, loaded.optimizer)
    for run in (saved, loaded):
        torch.manual_seed(3)
        run.step()
    states = [training_state(run.model, run.optimizer) for run in (loaded, saved)]
    torch.testing.assert_close(*states, atol=0, rtol=0)


def test_a_cpu_has_nothing_to_offload_and_says_so(tmp_path: Path) -> None:
    config = run_config(tmp_path, device="cpu", linear="mkl", offload_optimizer=True)
    built = build_model(config, 256, ALONE, {})
    assert built.lines["optimizer"].startswith("state is not offloaded: cpu has no memory apart")
    assert build_optimizer(config, built.model)._state_device is None
    plain = run_config(tmp_path, device="cpu", linear="mkl")
    assert "optimizer" not in build_model(plain, 256, ALONE, {}).lines


@pytest.mark.gpu
def test_on_cuda_the_state_is_in_page_locked_host_memory() -> None:
    outcomes = []
    for state_device in (None, CPU):
        torch.manual_seed(0)
        model = build(NETS["hrm"]).cuda()
        optimizer = AdamATan2(model.parameters(), lr=1e-2, ema=0.9, state_device=state_device)
        for _ in range(4):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
        if state_device:
            for state in optimizer.state.values():
                assert state["exp_avg"].is_pinned() and state["param_ema"].is_pinned()
        state = training_state(model, optimizer)
        outcomes.append(
            {kind: {n: t.cpu() for n, t in part.items()} for kind, part in state.items()}
        )
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=0, rtol=0)
