"""The figures of recurrence are what their names say, over real tokens and all parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import write_tiny_data
from net_cases import NETS, build
from run_cases import ALONE, TinyRun
from sight_cases import WatchedRun
from torch import Tensor, nn

from models.transformer import Stack
from training import adam_atan2
from training.compiling import CompileMode, compile_model
from training.diagnostics import UpdateFigures, level_of, state_figures, watched

LEVELS = {
    "hrm": {"H", "L", "embedding", "head"},
    "rins": {"H", "L", "embedding", "head"},
    "trm": {"stack", "embedding", "head"},
    "ut": {"stack", "embedding", "head"},
    "transformer": {"stack", "embedding", "head"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("sight") / "data", examples=40)


class Recorder:
    """Keeps every state, and the stream that it is the norm of."""

    def __init__(self) -> None:
        self.states: dict[str, list[Tensor]] = {}
        self.streams: dict[str, list[Tensor]] = {}

    def keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self.stream = output

    def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
        self.states.setdefault(name, []).append(after)
        self.streams.setdefault(name, []).append(self.stream)


@pytest.mark.parametrize("net", ["hrm", "ut post-norm", "transformer"])
def test_states_are_measured_as_their_names_say_and_padding_is_left_out(
    data: Path, net: str
) -> None:
    run, trace = WatchedRun(data, ALONE, net=net), Recorder()
    (batch,) = run.batches(1024, drop_last_batch=False)
    num_tokens = int(batch.layout.num_tokens)
    assert num_tokens < len(batch.tokens)
    stacks = [module for module in run.model.modules() if isinstance(module, Stack)]
    hooks = [stack.layers[-1].register_forward_hook(trace.keep) for stack in stacks]
    with torch.no_grad():
        run.model(batch.tokens, batch.positions, batch.layout, trace=trace)
    for hook in hooks:
        hook.remove()
    expected: dict[str, float] = {}
    for name, states in trace.states.items():
        real = [state[:num_tokens].double() for state in states]
        for call, state in enumerate(real, start=1):
            stream = trace.streams[name][call - 1][:num_tokens].double()
            if run.model.config.norm_type == "pre":
                normed = stream / stream.square().mean(1, keepdim=True).sqrt()
                torch.testing.assert_close(normed, state, atol=1e-5, rtol=0)
            expected[f"state/{name}_{call}/norm"] = float(stream.square().mean(1).sqrt().mean())
            if call > 1:
                before = real[call - 2]
                change = (state - before).square().sum(1).sqrt() / before.square().sum(1).sqrt()
                expected[f"state/{name}_{call}/change"] = float(change.mean())
    assert state_figures(run.model, batch, ALONE) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("backprop_steps", [1, 2, 5])
def test_norms_are_those_of_gradients_and_of_what_the_step_changed(
    data: Path, backprop_steps: int, ema: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adam_atan2, "BATCH_ELEMENTS", 3000)  # several batches of parameters
    run = WatchedRun(data, ALONE, ema=ema)
    params = dict(run.model.named_parameters())
    gradients: dict[str, Tensor] = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
        )
    )
    before = {name: param.detach().clone() for name, param in params.items()}
    run.optimizer.watch = figures = UpdateFigures(run.model, ALONE)
    run.step(backprop_steps=backprop_steps)
    found = figures.take()

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.cat([tensor.detach().flatten() for tensor in tensors]).double().norm())

    for level in (*LEVELS["hrm"], "total"):
        names = [n for n in gradients if level in (level_of(n, run.model.config), "total")]
        if not names:
            names_of_level = [n for n in params if level_of(n, run.model.config) == level]
            assert all(torch.equal(params[name], before[name]) for name in names_of_level)
            assert all(found[f"{kind}/{level}"] == 0 for kind in KINDS)
            continue
        update = norm([params[name] - before[name] for name in names])
        assert found[f"grad_norm/{level}"] == pytest.approx(norm([gradients[n] for n in names]))
        assert found[f"update_norm/{level}"] == pytest.approx(update, rel=1e-5)
        ratio = update / norm([before[name] for name in names])
        assert found[f"update_ratio/{level}"] == pytest.approx(ratio, rel=1e-5)
    assert len(found) == 3 * 5
    unreached = {level for level in LEVELS["hrm"] if not found[f"grad_norm/{level}"]}
    assert unreached == {1: {"H", "L", "embedding"}, 2: {"embedding"}, 5: set()}[backprop_steps]


KINDS = ("grad_norm", "update_norm", "update_ratio")


def test_a_step_is_watched_alone(data: Path) -> None:
    run = WatchedRun(data, ALONE)
    batches = run.batches(1024, drop_last_batch=False)
    (states,) = (state_figures(run.model, batch, ALONE) for batch in batches)
    with watched(run.model, run.optimizer, batches, ALONE, True) as figures:
        assert figures == states
        run.step()
    assert figures.keys() == states.keys() | {
        f"{kind}/{level}" for kind in KINDS for level in (*LEVELS["hrm"], "total")
    }
    before = dict(figures)
    with watched(run.model, run.optimizer, batches, ALONE, False) as none:
        run.step()
    assert (figures, none) == (before, {})


def test_an_error_ends_the_watching(data: Path) -> None:
    run = WatchedRun(data, ALONE)
    batches = run.batches(1024, drop_last_batch=False)
    with pytest.raises(RuntimeError), watched(run.model, run.optimizer, batches, ALONE, True):
        raise RuntimeError
    assert run.optimizer.watch is None


@pytest.mark.parametrize("mode", ["block", "stack", "step"])
def test_states_of_a_compiled_net_are_found_too(data: Path, mode: CompileMode) -> None:
    plain, compiled = (WatchedRun(data, ALONE) for _ in range(2))
    compile_model(compiled.model, mode, backend="eager")
    (batch,) = plain.batches(1024, drop_last_batch=False)
    with torch.no_grad():
        compiled.model(batch.tokens, batch.positions, batch.layout)  # compiles
    found = state_figures(compiled.model, batch, ALONE)
    assert found == state_figures(plain.model, batch, ALONE)


def test_watching_changes_no_bit_of_an_update(tmp_path: Path) -> None:
    states = []
    for is_watched in (False, True):
        run = TinyRun(tmp_path)
        run.optimizer.watch = UpdateFigures(run.model, ALONE) if is_watched else None
        torch.manual_seed(0)
        for _ in range(3):
            run.step()
        states.append([p.detach().clone() for p in run.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("net", LEVELS)
def test_every_parameter_has_its_level(net: str) -> None:
    model = build(NETS[net])
    assert {level_of(name, model.config) for name, _ in model.named_parameters()} == LEVELS[net]
