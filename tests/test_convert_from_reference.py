"""Runs of the original trainer become ours, exactly, and nothing in them is executed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_pretrain
from net_cases import build, golden_config, read_case
from reference_cases import case_run, stored_of
from run_cases import by_our_names
from safetensors.torch import load_file

from conversion.convert_from_reference import convert
from models.batch import PackedLayout
from training.building import build_optimizer
from training.checkpoint import EMA, MODEL, OPTIMIZER, training_state
from training.run_records import choose_checkpoint, stored_config, stored_metadata
from training.schema import RunConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
MACHINE = ("linear=mkl", "device=cpu", "num_threads=1", "tracker=none", "attention=dense")


def test_golden_run_is_taken_over_exactly(golden_checkpoint: Path, tmp_path: Path) -> None:
    case = read_case(golden_checkpoint)
    convert(golden_checkpoint / "run", tmp_path / "run")
    checkpoint = choose_checkpoint(tmp_path / "run")
    checkpoint.verify()
    progress = checkpoint.progress
    assert (progress.epoch, progress.cursor) == (case["epochs"], 0)
    assert progress.step == case["steps_run"]
    stored = stored_of(checkpoint)
    expected = by_our_names(load_file(golden_checkpoint / "expected_ema.safetensors"))
    found = {name: stored[EMA][name] for name in expected}
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    num_compared = 0
    for name, (total, magnitude, shape, dtype) in case["checksums"].items():
        kind, _, original = name.partition(".")
        (ours,) = by_our_names({original: torch.empty(0)})
        folder = {"param": MODEL, "param_ema": EMA}.get(kind, OPTIMIZER)
        tensor = stored[folder][ours if folder != OPTIMIZER else f"{kind}.{ours}"]
        assert (list(tensor.shape), str(tensor.dtype)) == (shape, dtype), name
        sums = float(tensor.double().sum()), float(tensor.double().abs().sum())
        assert sums == pytest.approx((total, magnitude), rel=1e-12, abs=1e-12), name
        num_compared += 1
    buffers = set(stored[MODEL]) - set(expected)
    assert num_compared == 5 * len(expected)
    assert buffers <= {"model.z_L_init"}
    assert set(stored[EMA]) == set(stored[MODEL]) and len(stored[OPTIMIZER]) == 3 * len(expected)


def test_golden_run_fits_our_trainer(golden_checkpoint: Path, tmp_path: Path) -> None:
    convert(golden_checkpoint / "run", tmp_path / "run")
    stored = stored_config(tmp_path / "run")
    assert stored is not None
    config = RunConfig(**stored)
    model = build(config.arch, stored_metadata(tmp_path / "run").vocab_size)
    optimizer = build_optimizer(config, model)
    checkpoint = choose_checkpoint(tmp_path / "run")
    checkpoint.restore(model, optimizer)
    dtypes = {
        folder: {name: tensor.dtype for name, tensor in tensors.items()}
        for folder, tensors in training_state(model, optimizer).items()
    }
    assert dtypes == {
        folder: {name: tensor.dtype for name, tensor in tensors.items()}
        for folder, tensors in stored_of(checkpoint).items()
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings as a command line writes them."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif key != "head":
            yield f"{prefix}{key}={'null' if value is None else value}"


def test_golden_run_is_continued_as_the_original_did(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    case = read_case(golden_checkpoint)
    work, epoch = tmp_path / "work", max(1, case["epochs"] - 1)
    work.mkdir()
    convert(golden_checkpoint / "run", work / "run", epoch)
    stored = stored_config(work / "run")
    assert stored is not None
    again = {key: stored[key] for key in ("arch", "epochs", "lr", "lr_min_ratio", "ema", "seed")}
    again |= {key: stored[key] for key in ("lr_warmup_steps", "weight_decay", "beta1", "beta2")}
    again |= {"global_batch_size": stored["global_batch_size"], "fwd_bwd_dtype": "float32"}
    net = again["arch"].pop("name")
    data = work / stored["data"]["path"]
    data.parent.mkdir(parents=True)
    data.symlink_to(golden_checkpoint / "run" / "data")
    done = run_pretrain(
        *(f"arch/net@arch={net}", *flat(again), "schedule_steps=published", *MACHINE),
        *(f"data.path={stored['data']['path']}", "checkpoint_path=run", "keep_last=null"),
        cwd=work,
    ).check()
    if epoch == case["epochs"]:
        assert "finished already" in done.stdout
        return
    assert re.search(rf"^continued +fsdp2_epoch_{epoch}, step", done.stdout, re.M)
    checkpoint = choose_checkpoint(work / "run", epoch=case["epochs"])
    assert checkpoint.progress.step == case["steps_run"]
    expected = by_our_names(load_file(golden_checkpoint / "expected_ema.safetensors"))
    averages = checkpoint.load_weights(use_ema=True)
    found = {name: averages[name] for name in expected}
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_golden_nets_of_all_kinds_are_taken_over(golden_nets: Path, tmp_path: Path) -> None:
    case = read_case(golden_nets)
    convert(case_run(golden_nets, tmp_path / "theirs"), tmp_path / "run")
    stored = stored_config(tmp_path / "run")
    assert stored is not None and RunConfig(**stored).arch == golden_config(case)
    model = build(golden_config(case), case["config"]["vocab_size"])
    model.load_state_dict(choose_checkpoint(tmp_path / "run").load_weights(use_ema=False))
    batch = load_file(golden_nets / case["files"]["batch"])
    count = case["scalars"]["numseqs"]
    layout = PackedLayout.from_lengths(
        batch["prefix_lens"][:count], batch["causal_lens"][:count], count
    )
    with torch.no_grad():
        hidden = model(batch["inputs"], batch["position_ids"], layout)
    num_tokens = case["scalars"]["total_seqlen"]
    expected = load_file(golden_nets / case["files"]["logits"])["logits"]
    torch.testing.assert_close(
        model.logits(hidden)[:num_tokens], expected[:num_tokens], atol=2e-5, rtol=0
    )
