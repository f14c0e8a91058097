"""A run continues from its newest whole checkpoint, and starts from another run's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_cases import TinyRun, finished_run, run_config, whole_state
from torch import nn

from training.adam_atan2 import AdamATan2
from training.checkpoint import (
    PROGRESS_FILE,
    Checkpoint,
    RunDirectory,
)
from training.distributed import World
from training.run_records import (
    choose_checkpoint,
)
from training.schema import RunConfig
from training.starting import find_start, load_start


def continue_run(
    directory: RunDirectory, config: RunConfig, model: nn.Module, optimizer: AdamATan2
) -> tuple[Checkpoint | None, list[str]]:
    """What pretrain.py does on one rank."""
    start = find_start(directory, config)
    load_start(start, config, model, optimizer)
    return start.checkpoint, list(start.notes)


def start_from(config: RunConfig, model: nn.Module, optimizer: AdamATan2) -> str:
    """The same for a new run that takes another one's weights."""
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    directory = RunDirectory(Path(f"{config.checkpoint_path}-new"), alone)
    return load_start(find_start(directory, config), config, model, optimizer)["starts from"]


def test_a_new_folder_has_nothing_to_continue(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    assert continue_run(run.directory, run.config, run.model, run.optimizer) == (None, [])


def test_a_run_continues_from_its_furthest_checkpoint(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3, 6)
    expected = whole_state(run.model, run.optimizer)
    other = TinyRun(tmp_path / "run", seed=2)
    checkpoint, notes = continue_run(run.directory, run.config, other.model, other.optimizer)
    assert checkpoint is not None and checkpoint.progress.step == 6 and notes == []
    found = whole_state(other.model, other.optimizer)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_run_that_has_saved_nothing_yet_begins_anew(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    found, notes = continue_run(run.directory, run.config, run.model, run.optimizer)
    assert (found, notes) == (None, ["no complete checkpoint yet: starts from the beginning"])


@pytest.mark.parametrize("file", ["optimizer/.metadata", PROGRESS_FILE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, file: str
) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    expected = whole_state(run.model, run.optimizer)
    run.save_steps(6)
    (run.directory.path / "fsdp2_step_6" / file).write_bytes(b"{}")
    checkpoint, notes = continue_run(run.directory, run.config, run.model, run.optimizer)
    assert checkpoint is not None and checkpoint.path.name == "fsdp2_step_3"
    (note,) = notes
    assert note.startswith("skipped a checkpoint: ")
    assert f"fsdp2_step_6/{file} does not match its digest" in note
    found = whole_state(run.model, run.optimizer)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("file", ["model/.metadata", PROGRESS_FILE])
def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew(
    tmp_path: Path, file: str
) -> None:
    run = TinyRun(tmp_path / "run").create()
    for checkpoint in run.save_steps(3, 6):
        (checkpoint.path / file).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint that can be continued from") as raised:
        continue_run(run.directory, run.config, run.model, run.optimizer)
    for name in ("fsdp2_step_3", "fsdp2_step_6"):
        assert f"{name}/{file} does not match its digest" in str(raised.value)


def test_settings_that_differ_are_told_and_the_new_ones_count(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    changed = run_config(tmp_path / "run", lr=5e-4, weight_decay=0.0, num_threads=1, log_interval=7)
    _, notes = continue_run(run.directory, changed, run.model, run.optimizer)
    assert notes == ["lr: was 0.001, now 0.0005", "weight_decay: was 0.1, now 0.0"]
    assert run.optimizer.param_groups[0]["lr"] == 1e-2  # the optimizer's settings are not loaded


def test_more_epochs_would_change_the_schedule_of_a_run(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    longer = run_config(tmp_path / "run", epochs=4)
    with pytest.raises(ValueError, match=r"epochs=4, but .* begun with epochs=2.*new_run=true"):
        find_start(run.directory, longer)
    fixed = run_config(tmp_path / "run", epochs=4, schedule_steps=100)
    start = find_start(run.directory, fixed)
    assert start.checkpoint is not None and not start.is_finished


def test_what_changes_the_last_bits_is_told(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    changed = run_config(tmp_path / "run", micro_batch_size=32, deterministic=True)
    told = "the run is no longer bit-equal"
    assert find_start(run.directory, changed).notes == (
        f"micro_batch_size: was None, now 32; {told}",
        f"deterministic: was False, now True; {told}",
    )


def test_a_run_does_not_start_from_itself(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3)
    config = run_config(tmp_path / "run", resume_from=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is this very run; leave resume_from out"):
        find_start(run.directory, config)


def test_weights_to_start_from_are_not_forgotten(tmp_path: Path) -> None:
    source = tmp_path / "source"
    finished_run(source)
    run = TinyRun(tmp_path / "run")
    config = run_config(tmp_path / "run", resume_from=str(source))
    run.directory.create(config.model_dump(), {"vocab_size": 256})  # killed before it saved
    assert find_start(run.directory, config).source is not None
    with pytest.raises(ValueError, match=r"was to start from resume_from=.*give what it was"):
        find_start(run.directory, run_config(tmp_path / "run"))


def test_a_new_run_is_not_begun_where_one_already_is(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    config = run_config(tmp_path / "run", new_run=True)
    with pytest.raises(ValueError, match=r"new_run=true, but .* already holds a run"):
        continue_run(run.directory, config, run.model, run.optimizer)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    run = TinyRun(tmp_path)
    with pytest.raises(ValueError, match=r"but no run \(all_config.yaml is missing\)"):
        continue_run(run.directory, run.config, run.model, run.optimizer)


def test_another_run_s_weights_and_optimizer_state_are_taken(tmp_path: Path) -> None:
    source = finished_run(tmp_path / "source")
    expected = whole_state(source.model, source.optimizer)
    run = TinyRun(tmp_path / "run", seed=2)
    config = run_config(tmp_path / "run", resume_from=str(tmp_path / "source"))
    told = start_from(config, run.model, run.optimizer)
    assert "fsdp2_epoch_2 (weights, optimizer state, EMA)" in told
    found = whole_state(run.model, run.optimizer)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_another_run_s_averages_alone_are_taken(tmp_path: Path) -> None:
    source = finished_run(tmp_path / "source")
    averages = choose_checkpoint(tmp_path / "source", epoch=1).load_weights(use_ema=True)
    run = TinyRun(tmp_path / "run", seed=2)
    fresh = whole_state(run.model, run.optimizer)
    config = run_config(
        tmp_path / "run",
        resume_from=str(tmp_path / "source"),
        resume_epoch=1,
        weights_only_resume_from_ema=True,
    )
    assert "fsdp2_epoch_1 (EMA weights; a fresh optimizer)" in start_from(
        config, run.model, run.optimizer
    )
    found = whole_state(run.model, run.optimizer)
    expected = {"model": averages, "ema": averages, "optimizer": fresh["optimizer"]}
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert source.directory.damaged() == []


def test_an_average_that_the_source_lacks_starts_from_the_weights(tmp_path: Path) -> None:
    source = TinyRun(tmp_path / "source", ema=None).create()
    source.save_steps(3)
    run = TinyRun(tmp_path / "run", seed=2)
    config = run_config(tmp_path / "run", resume_from=str(tmp_path / "source"))
    assert "no EMA is there: it starts from the weights" in start_from(
        config, run.model, run.optimizer
    )
    expected = whole_state(source.model, source.optimizer)
    found = whole_state(run.model, run.optimizer)
    torch.testing.assert_close(found, {**expected, "ema": expected["model"]}, atol=0, rtol=0)


def test_moments_that_the_source_lacks_start_at_zero(tmp_path: Path) -> None:
    source = TinyRun(tmp_path / "source", betas=(0.0, 0.95)).create()
    source.save_steps(3)
    run = TinyRun(tmp_path / "run", seed=2, ema=None)
    config = run_config(tmp_path / "run", resume_from=str(tmp_path / "source"), ema=None)
    told = start_from(config, run.model, run.optimizer)
    assert "exp_avg is not in it: from zero" in told and "its EMA is left" in told
    before, now = (whole_state(each.model, each.optimizer) for each in (source, run))
    moments = {name: t for name, t in now["optimizer"].items() if name.startswith("exp_avg.")}
    assert moments and not any(t.any() for t in moments.values())
    expected = now["optimizer"] | before["optimizer"]
    torch.testing.assert_close(now["optimizer"], expected, atol=0, rtol=0)


def test_differences_from_the_source_are_told(tmp_path: Path) -> None:
    finished_run(tmp_path / "source")
    config = run_config(tmp_path / "new", resume_from=str(tmp_path / "source"), lr=5e-4, epochs=3)
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    notes = find_start(RunDirectory(tmp_path / "new", alone), config).notes
    told = (
        f"than in {tmp_path / 'source'}: {each}" for each in ("epochs: was 2, now 3", "lr: was")
    )
    for note, beginning in zip(notes, told, strict=True):
        assert note.startswith(beginning)


def test_weights_are_not_taken_from_what_holds_none(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run")
    config = run_config(tmp_path / "run", resume_from=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"resume_from=.*nowhere is no run directory"):
        start_from(config, run.model, run.optimizer)
    without_average = TinyRun(tmp_path / "raw", ema=None).create()
    without_average.save_steps(3)
    config = run_config(
        tmp_path / "run", resume_from=str(tmp_path / "raw"), weights_only_resume_from_ema=True
    )
    with pytest.raises(ValueError, match="fsdp2_step_3 holds no EMA weights; leave weights_only"):
        start_from(config, run.model, run.optimizer)
