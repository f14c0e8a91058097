"""Of a run the wanted checkpoint and weights are taken, whole, or it is said what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import write_run
from model_cases import assert_refused, edit, opened
from net_cases import NETS
from run_cases import ALONE
from torch import Tensor

from inference.model_folder import ModelOptions
from training.checkpoint import Progress, RunDirectory
from training.tensor_store import read_tensors


def save_again(run: Path, epoch: int, factor: float) -> dict[str, dict[str, Tensor]]:
    """A further epoch's checkpoint whose averaged weights are those of epoch 2 times `factor`."""
    state = {
        "model": read_tensors(run / "fsdp2_epoch_2/model"),
        "ema": {k: t * factor for k, t in read_tensors(run / "fsdp2_epoch_2/ema").items()},
        "optimizer": {"moment": torch.ones(3)},
    }
    RunDirectory(run, ALONE).save(f"fsdp2_epoch_{epoch}", state, Progress(epoch, 0, 20 * epoch), {})
    return state


def test_averaged_weights_are_taken_where_they_are_and_raw_ones_when_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    state = save_again(run, 3, factor=0.5)
    name = "lm_head.weight"
    for options, kind in (({}, "ema"), ({"ckpt_use_ema": True}, "ema")):
        found = opened(run, **options)
        assert torch.equal(found.model.state_dict()[name], state[kind][name])
    raw = opened(run, ckpt_use_ema=False)
    assert torch.equal(raw.model.state_dict()[name], state["model"][name])
    assert "raw weights" in raw.description
    RunDirectory(run, ALONE).save(
        "fsdp2_epoch_4", {"model": state["model"]}, Progress(4, 0, 80), {}
    )
    assert "fsdp2_epoch_4 (epoch 4, step 80, raw weights)" in opened(run).description
    assert_refused(run, "fsdp2_epoch_4 holds no EMA weights.*leave ckpt_use_ema", ckpt_use_ema=True)


def test_a_checkpoint_is_named_by_epoch_or_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    save_again(run, 3, factor=0.5)
    (run / "fsdp2_epoch_2").rename(run / "fsdp2_step_40")
    assert "fsdp2_epoch_3 " in opened(run).description
    assert "fsdp2_step_40 " in opened(run, ckpt_step=40).description
    there = "it has fsdp2_epoch_3, fsdp2_step_40"
    assert_refused(run, f"has no fsdp2_epoch_2; {there}", ckpt_epoch=2)
    assert_refused(run, f"has no fsdp2_step_3; {there}", ckpt_step=3)
    with pytest.raises(ValueError, match="ckpt_epoch=2 and ckpt_step=3 name two checkpoints"):
        ModelOptions(ckpt_path=run, ckpt_epoch=2, ckpt_step=3)


def test_only_the_weights_that_are_wanted_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for kind in ("model", "optimizer"):
        for file in (run / "fsdp2_epoch_2" / kind).iterdir():
            file.write_bytes(b"")
    assert opened(run).model.lm_head.weight.any()
    assert_refused(run, "model/.* does not match its digest", ckpt_use_ema=False, ckpt_epoch=2)


def cut_weights(checkpoint: Path) -> None:
    (file,) = (checkpoint / "ema").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])


def unpublish(checkpoint: Path) -> None:
    (checkpoint / "digests.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [(cut_weights, "does not match its digest"), (unpublish, "is no complete checkpoint")],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    run = write_run(tmp_path / "run")
    save_again(run, 3, factor=0.5)
    damage(run / "fsdp2_epoch_3")
    description = opened(run).description
    assert "fsdp2_epoch_2 (epoch 2, " in description
    assert "; passed over: " in description and "fsdp2_epoch_3" in description
    assert told in description
    assert_refused(run, told, ckpt_epoch=3)
    damage(run / "fsdp2_epoch_2")
    assert_refused(run, f"holds no complete checkpoint .*{told}.*{told}")


def rename_net(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        edit(run / "all_config.yaml", lambda content: content["arch"].update(name=name))

    return change


def wrong_arch(**settings: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        edit(run / "all_config.yaml", lambda content: content["arch"].update(settings))

    return change


def other_net(run: Path) -> None:
    arch = NETS["transformer"].model_dump()
    edit(run / "all_config.yaml", lambda content: content.update(arch=arch))


def larger_vocabulary(run: Path) -> None:
    edit(run / "train_metadata.yaml", lambda content: content.update(vocab_size=1024))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rename_net("mamba"), "arch.name='mamba' is no architecture of this version; it knows hrm"),
        (
            rename_net("baselines.ut_nocarry@UniversalTransformer"),
            "by the original trainer .*python -m conversion.convert_from_reference",
        ),
        (wrong_arch(future=1), "no architecture of this version: arch.future=1: Extra inputs"),
        (wrong_arch(num_heads=3), "describes no architecture.*num_heads=3"),
        (wrong_arch(n_layers=4), "has no tensor 'model.H_module.layers.1"),
        (wrong_arch(hidden_size=64), r"has shape \[32\], the model wants \[64\]; the architecture"),
        (other_net, "ema holds 'model.H_module.layers.0.* which the net .* does not have"),
        (larger_vocabulary, r"has shape \[512, 32\], the model wants \[1024, 32\]"),
        (lambda run: (run / "all_config.yaml").unlink(), "run holds no model: it is neither a run"),
        (lambda run: (run / "train_metadata.yaml").unlink(), "train_metadata.yaml is missing"),
        (
            lambda run: shutil.rmtree(run / "fsdp2_epoch_2"),
            "holds no complete checkpoint .*train it",
        ),
        (lambda run: (run / "all_config.yaml").write_text("[]"), "holds no run's configuration"),
        (lambda run: (run / "environment.json").write_text("["), "environment.json cannot be read"),
    ],
)
def test_a_run_that_holds_no_model_of_ours_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(run := write_run(tmp_path / "run"))
    assert_refused(run, told)


def test_a_golden_run_of_the_original_trainer_is_sent_to_the_converter(
    golden_checkpoint: Path,
) -> None:
    told = r"by the original trainer \(arch.name=baselines\..*conversion.convert_from_reference"
    assert_refused(golden_checkpoint / "run", told)
