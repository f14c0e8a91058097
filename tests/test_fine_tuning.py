"""The published fine-tuning line: from another run's weights, in one process and in two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import PRETRAIN, TINY, Done, run_pretrain, start_command, write_tiny_data

from training.run_records import stored_config
from training.telemetry import METRICS_FILE, read_metrics

SHAPE = [setting for setting in TINY if setting.startswith("arch.")]
MACHINE = ("linear=mkl", "device=cpu", "log_interval=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data and the run of another recipe, another net and shape."""
    folder = tmp_path_factory.mktemp("tuning") / "work"
    write_tiny_data(folder / "data")
    arguments = (*TINY, "arch/net@arch=rins", "arch.rope_theta=500.0", "arch.norm_type=post")
    run_pretrain(*arguments, "data.path=data", "epochs=1", "run_name=base", cwd=folder).check()
    return folder


def tuning(run: str, *more: str) -> tuple[str, ...]:
    """The line of the README, as far as this machine goes."""
    return (
        *("--config-name", "cfg_sft", "data.path=data", "resume_from=checkpoints/data/base"),
        *(f"+checkpoint_path=tuned/{run}", "global_batch_size=64", "epochs=2", *MACHINE, *more),
    )


def assert_tuned(done: Done, folder: Path, run: str, taken: str) -> None:
    done.check()
    assert re.search(
        rf"^starts from +checkpoints/data/base/fsdp2_epoch_1 \({taken}\)$", done.stdout, re.M
    )
    assert "than in checkpoints/data/base: ema: was 0.9999, now 0.999\n" in done.stdout
    config = stored_config(folder / "tuned" / run)
    assert config is not None
    arch = config["arch"]
    shape = (arch["name"], arch["n_layers"], arch["hidden_size"], arch["norm_type"])
    assert (*shape, arch["rope_theta"]) == ("rins", 2, 16, "post", 500.0)
    lines = read_metrics(folder / "tuned" / run / METRICS_FILE)
    assert lines[0]["step"] == 1 and lines[0]["train/lr"] < 3e-5


def test_weights_and_optimizer_state_are_taken(folder: Path) -> None:
    done = run_pretrain(*tuning("all"), cwd=folder)
    assert_tuned(done, folder, "all", "weights, optimizer state, EMA")
    again = run_pretrain(*tuning("all"), cwd=folder).check()
    assert "finished already: 2 epochs" in again.stdout


def test_averaged_weights_alone_are_taken(folder: Path) -> None:
    done = run_pretrain(*tuning("ema", "weights_only_resume_from_ema=true"), cwd=folder)
    assert_tuned(done, folder, "ema", "EMA weights; a fresh optimizer")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("taken", "flag"),
    [
        ("EMA weights; a fresh optimizer", ["weights_only_resume_from_ema=true"]),
        pytest.param("weights, optimizer state, EMA", [], marks=pytest.mark.slow),
    ],
)
def test_two_processes_tune_like_one(taken: str, flag: list[str], folder: Path) -> None:
    run = f"two-{len(flag)}"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command = (*torchrun, str(PRETRAIN), *tuning(run, "max_steps=2", *flag))
    threads = {"OMP_NUM_THREADS": "1"}
    done = start_command(*command, cwd=folder, environment=threads).wait()
    assert_tuned(done, folder, run, taken)


def test_a_tuning_that_was_stopped_goes_on_from_its_own_weights(folder: Path) -> None:
    run_pretrain(*tuning("stopped", "max_steps=3"), cwd=folder).check()
    done = run_pretrain(*tuning("stopped"), cwd=folder).check()
    assert re.search(r"^continued +fsdp2_step_3", done.stdout, re.M)
    assert "starts from" not in done.stdout


def test_the_shape_may_be_said_again(folder: Path) -> None:
    """As the published system wants it, by hand."""
    run_pretrain(*tuning("said", *SHAPE, "max_steps=1"), cwd=folder).check()
