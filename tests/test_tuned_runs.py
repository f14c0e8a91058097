"""Runs that train a part of the weights: frozen ones, adapters, and the best checkpoint of each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, assert_refused, run_pretrain, write_tiny_data
from export_cases import exported, greedy, loaded
from torch import Tensor

from inference.model_folder import ModelOptions, open_model
from inference.run_folder import open_run
from models.lora import LoraConfig, adapters_of, is_adapter, merged
from training.checkpoint import BEST, EMA, MODEL, OPTIMIZER, read_checkpoint
from training.run_records import choose_checkpoint
from training.telemetry import METRICS_FILE, read_metrics
from training.tensor_store import read_tensors

MACHINE = ("linear=mkl", "device=cpu", "log_interval=5")
BASE = "checkpoints/data/base"
FROM = (f"resume_from={BASE}", "weights_only_resume_from_ema=true")
LORA = ("lora.rank=3", "lora.alpha=6")
SCALE = 2.0
CYCLES = ("arch.H_cycles=2", "arch.L_cycles=2", "arch.bp_max_steps=4", "arch.bp_min_steps=2")
WATCH = ("val_data.path=held_out", "val_data.interval=2", "val_data.keep_best=true")
# At this rate the loss soon stops to fall.
HOT = ("lr=0.3", "lr_min_ratio=1.0", "ema=null")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, a run to tune, and tunings of it."""
    folder = tmp_path_factory.mktemp("tuned") / "work"
    write_tiny_data(folder / "data")
    write_tiny_data(folder / "held_out", examples=9, epochs=1)
    run_pretrain(*TINY, *CYCLES, "data.path=data", "epochs=1", "run_name=base", cwd=folder).check()
    first = ("checkpoint_start=true", "lr=1e-2", "lr_min_ratio=1.0")
    tune(folder, "shared", *LORA, *first)
    tune(folder, "own", *LORA, "lora.per_cycle=true", *first)
    tune(folder, "best", *HOT, *WATCH, "checkpoint_steps=2", "keep_last=1")
    tune(folder, "frozen", "+freeze=[embed_tokens,H_module.layers.0.attn]", *first)
    return folder


def tune(folder: Path, run: str, *more: str, start: tuple[str, ...] = FROM) -> str:
    return run_pretrain(*line(run, *more, start=start), cwd=folder).check().stdout


def line(run: str, *more: str, start: tuple[str, ...] = FROM) -> tuple[str, ...]:
    recipe = ("--config-name", "cfg_sft", "data.path=data", "epochs=1", "global_batch_size=64")
    return (*recipe, *MACHINE, f"checkpoint_path=tuned/{run}", *start, *more)


def weights(folder: Path, run: str, name: str = "fsdp2_epoch_1", part: str = MODEL) -> Any:
    return read_tensors(folder / run / name / part)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("run", ["shared", "own"])
def test_adapters_alone_are_trained(run: str, folder: Path) -> None:
    base = weights(folder, BASE, part=EMA)
    for name in ("fsdp2_step_0", "fsdp2_epoch_1"):
        for part in (MODEL, EMA):
            found = weights(folder, f"tuned/{run}", name, part)
            assert same({k: v for k, v in found.items() if not is_adapter(k)}, base)
            zeros = [not v.any() for k, v in found.items() if k.endswith("lora_B")]
            assert zeros and all(zeros) == (name == "fsdp2_step_0")
    raw, averaged = (weights(folder, f"tuned/{run}", part=part) for part in (MODEL, EMA))
    assert all(raw[name].equal(averaged[name]) != is_adapter(name) for name in raw)
    state = weights(folder, f"tuned/{run}", part=OPTIMIZER)
    assert state and all(map(is_adapter, state))


def test_frozen_weights_stay_and_have_no_state(folder: Path) -> None:
    base, tuned = weights(folder, BASE, part=EMA), weights(folder, "tuned/frozen")
    averaged = weights(folder, "tuned/frozen", part=EMA)
    state = weights(folder, "tuned/frozen", part=OPTIMIZER)
    frozen = {"model.embed_tokens.weight"}
    frozen |= {f"model.H_module.layers.0.attn.{each}_proj.weight" for each in ("gqkv", "o")}
    for name in base.keys() - {"model.z_L_init"}:
        stays = name in frozen
        assert base[name].equal(tuned[name]) == base[name].equal(averaged[name]) == stays, name
        assert (f"exp_avg.{name}" in state) != stays


@pytest.mark.parametrize(
    ("run", "what"),
    [
        ("shared", LORA),
        pytest.param(
            "frozen",
            ("freeze=[embed_tokens,H_module.layers.0.attn]",),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_part_that_was_stopped_goes_on_bit_for_bit(
    run: str, what: tuple[str, ...], folder: Path
) -> None:
    more = (*what, "lr=1e-2", "lr_min_ratio=1.0")
    tune(folder, f"{run}-stopped", *more, "max_steps=4")
    stdout = tune(folder, f"{run}-stopped", *more)
    assert re.search(r"^continued +fsdp2_step_4", stdout, re.M)
    for part in (MODEL, EMA, OPTIMIZER):
        found = weights(folder, f"tuned/{run}-stopped", part=part)
        assert same(found, weights(folder, f"tuned/{run}", part=part)), part


def test_shared_adapters_are_asked_as_part_of_the_weights(folder: Path) -> None:
    stored = weights(folder, "tuned/shared", part=EMA)
    opened = open_model(ModelOptions(ckpt_path=folder / "tuned/shared", device="cpu"))
    assert "adapters of rank 3, merged into its weights" in opened.description
    for name, tensor in opened.model.state_dict().items():
        expected = stored[name]
        if (names := adapters_of(name))[0] in stored:
            expected = merged(stored[name], *(stored[each] for each in names), scale=SCALE)
            assert not torch.allclose(expected, stored[name], atol=1e-4)
        torch.testing.assert_close(tensor.float(), expected.float(), atol=1e-6, rtol=0)


def test_own_adapters_are_asked_and_fix_the_depth(folder: Path) -> None:
    stored = open_run(folder / "tuned/own")
    assert stored.call_adapters == LoraConfig(rank=3, alpha=6, per_cycle=True)
    options = {"ckpt_path": folder / "tuned/own", "device": "cpu"}
    opened = open_model(ModelOptions(**options))
    assert same(dict(opened.model.state_dict()), weights(folder, "tuned/own", part=EMA))
    with pytest.raises(ValueError, match="its depth is fixed; leave H_cycles out"):
        open_model(ModelOptions(**options, H_cycles=3))


@pytest.mark.parametrize(("run", "is_native"), [("shared", True), ("own", False)])
def test_exports_answer_as_the_run_does(
    run: str, is_native: bool, folder: Path, tmp_path: Path
) -> None:
    """The exporter compares the two and would refuse; here the folder is also asked by us."""
    out = exported(folder / "tuned" / run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ("hrm_text" if is_native else "recurrent_lm")
    assert config.get("lora") == (
        None if is_native else LoraConfig(rank=3, alpha=6, per_cycle=True).model_dump()
    )
    prompts = ["one", "two three"]
    assert greedy(loaded(out), prompts) == greedy(loaded(folder / "tuned" / run), prompts)


def test_a_run_may_start_from_merged_adapters(folder: Path) -> None:
    """Of another kind or none; from those of single calls only with the same settings."""
    start = ("resume_from=tuned/shared", "weights_only_resume_from_ema=true")
    tune(folder, "next", "checkpoint_start=true", "max_steps=1", start=start)
    expected = open_model(ModelOptions(ckpt_path=folder / "tuned/shared", device="cpu")).model
    assert same(weights(folder, "tuned/next", "fsdp2_step_0"), dict(expected.state_dict()))
    tune(folder, "same", *LORA, "max_steps=1", "checkpoint_start=true", start=start)
    same_adapters = weights(folder, "tuned/same", "fsdp2_step_0")
    assert same(same_adapters, weights(folder, "tuned/shared", part=EMA))
    start = ("resume_from=tuned/own", "weights_only_resume_from_ema=true")
    told = ("tuned/own has adapters for each call of a stack", "give the same lora settings")
    assert_refused(folder, *line("bad", start=start), told=told)


@pytest.mark.slow
def test_a_run_may_start_from_raw_weights_with_adapters(folder: Path) -> None:
    stdout = tune(folder, "raw", *LORA, "max_steps=1", start=(f"resume_from={BASE}",))
    assert "(weights, a fresh optimizer, EMA)" in stdout
    stdout = tune(folder, "raw2", "freeze=[lm_head]", "max_steps=1", start=(f"resume_from={BASE}",))
    assert "(weights, optimizer state, EMA)" in stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["freeze=[embed]"], ("freeze=embed names no weight", "embed_tokens", "lm_head")),
        (["freeze=['*']"], ("leaves no weight that a gradient reaches",)),
        ([*LORA, "freeze=[lm_head]"], ("with lora nothing but adapters is trained",)),
        (["lora.targets=[lm_head]"], ("lora.targets", "'gqkv_proj'")),
        (["lora.rank=0"], ("lora.rank=0", "greater than 0")),
        (["lora.rnk=3"], ("unknown key 'lora.rnk'", "did you mean lora.rank?")),
        ([*LORA, "lora.per_cycle=true", "compile=block"], ("use compile=none",)),
        (["resume_best=true"], ("has no fsdp2_best", "val_data.keep_best=true")),
        (["resume_best=true", "resume_epoch=1"], ("name two checkpoints",)),
    ],
)
def test_what_cannot_be_tuned(arguments: list[str], told: tuple[str, ...], folder: Path) -> None:
    assert_refused(folder, *line("bad", *arguments), told=told)


def test_adapters_of_nothing_are_refused(folder: Path) -> None:
    assert_refused(folder, *line("bad", *LORA, start=()), told=("give the run whose weights",))


def test_what_is_trained_stays_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned/shared", folder / "tuned/copied")
    told = ("lora=None, but tuned/copied was begun with lora={'alpha': 6.0",)
    assert_refused(folder, *line("copied", "lr=1e-2"), told=told)


def losses(folder: Path, run: str) -> dict[int, float]:
    lines = read_metrics(folder / "tuned" / run / METRICS_FILE)
    return {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}


def test_the_checkpoint_of_the_lowest_loss_is_kept_and_can_be_named(folder: Path) -> None:
    found = losses(folder, "best")
    lowest = min(found, key=lambda step: found[step])
    run = folder / "tuned/best"
    best = read_checkpoint(run / BEST)
    assert best.progress.step == lowest < max(found)
    best.verify()
    assert choose_checkpoint(run).path.name == "fsdp2_epoch_1"
    assert choose_checkpoint(run, best=True).path.name == BEST
    assert open_run(run, best=True).weights == run / BEST / MODEL
    start = ("resume_from=tuned/best", "resume_best=true")
    stdout = tune(folder, "after", "ema=null", "max_steps=1", start=start)
    assert re.search(r"^starts from +tuned/best/fsdp2_best", stdout, re.M)


@pytest.mark.slow
def test_a_run_stops_where_the_loss_falls_no_more(folder: Path) -> None:
    found = losses(folder, "best")
    lowest = min(found, key=lambda step: found[step])
    steps = sorted(found)
    spent = next(
        step
        for at, step in enumerate(steps)
        if at >= 2
        and min(found[s] for s in steps[at - 1 : at + 1]) > min(found[s] for s in steps[: at - 1])
    )
    more = (*HOT, *WATCH, "val_data.patience=2")
    stdout = tune(folder, "early", *more)
    assert f"stopped at step {spent} (val_data.patience=2: no val/loss below" in stdout
    assert max(losses(folder, "early")) == spent
    again = tune(folder, "early", *more)
    assert f"stopped at step {spent} (val_data.patience=2" in again
    assert max(losses(folder, "early")) == spent
    # Stopped in between, and without a word on patience, it is the run that never stopped.
    tune(folder, "early", *HOT, *WATCH)
    assert losses(folder, "early") == found
    assert same(weights(folder, "tuned/early"), weights(folder, "tuned/best"))
    assert read_checkpoint(folder / "tuned/early" / BEST).progress.step == lowest
