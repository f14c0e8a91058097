"""Whole runs in processes of their own: to the end, killed and continued, started from another."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import (
    PRETRAIN,
    TINY,
    Started,
    files_in,
    run_pretrain,
    start_command,
    start_interpreter,
    write_tiny_data,
)
from torch import Tensor

from training.command_line import parse_config
from training.environment import CODE_FILE
from training.telemetry import read_metrics
from training.tensor_store import read_tensors

SAVING = (
    "checkpoint_steps=7",
    "keep_last=null",
    "log_interval=3",
)  # 3 does not divide 7: sums outlive a stop
CONTINUED = "the newest unfinished run with these settings; new_run=true starts another"
TENSORS = ("model", "ema", "optimizer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 27 steps an epoch, two epochs."""
    return write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=125)


@pytest.fixture(scope="module")
def settings(data: Path) -> list[str]:
    return [f"data.path={data}", "epochs=2", *SAVING, *TINY]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """The directory of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_pretrain(*settings, "run_name=whole", cwd=folder).check()
    assert done.stdout.splitlines()[-1] == "done: checkpoints/data/whole"
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    return folder / "checkpoints/data/whole"


@pytest.fixture
def unfinished(tmp_path: Path, whole: Path) -> Path:
    """The same run in another working directory as it stood after one epoch."""
    run = tmp_path / "work/checkpoints/data/whole"
    shutil.copytree(whole, run)
    for checkpoint in run.glob("fsdp2_*"):
        if json.loads((checkpoint / "progress.json").read_text())["epoch"] == 2:
            shutil.rmtree(checkpoint)
    for checkpoint in run.glob("fsdp2_step_*"):
        shutil.rmtree(checkpoint)
    return run


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{kind}.{name}": tensor
        for kind in TENSORS
        for name, tensor in read_tensors(checkpoint / kind).items()
    }


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_run_leaves_everything_in_its_directory(whole: Path, settings: list[str]) -> None:
    names = {path.name for path in whole.iterdir()} - {CODE_FILE}
    steps = {f"fsdp2_step_{step}" for step in range(7, lines_of(whole)[-1]["step"] + 1, 7)}
    epochs = {"fsdp2_epoch_1", "fsdp2_epoch_2"}
    records = {"all_config.yaml", "train_metadata.yaml", "tokenizer.json"}
    records |= {"metrics.jsonl", "environment.json"}
    assert names == records | epochs | steps
    for checkpoint in epochs | steps:
        content = {path.name for path in (whole / checkpoint).iterdir()}
        assert content == {*TENSORS, "progress.json", "digests.json"}


def test_the_records_of_a_run_say_what_it_was(whole: Path, settings: list[str]) -> None:
    config, _ = parse_config(yaml.safe_load((whole / "all_config.yaml").read_text()))
    assert (config.run_name, config.project_name) == ("whole", "data")
    assert (config.lr, config.epochs, config.arch.hidden_size) == (1e-2, 2, 16)
    metadata = yaml.safe_load((whole / "train_metadata.yaml").read_text())
    assert (metadata["max_seq_len"], metadata["vocab_size"]) == (32, 512)
    environment = json.loads((whole / "environment.json").read_text())
    choices = environment["choices"]
    assert (choices["device"], choices["linear"], choices["threads"]) == ("cpu", "mkl", 1)


def test_metrics_are_written_every_interval_and_at_the_end(whole: Path) -> None:
    lines = lines_of(whole)
    last = lines[-1]["step"]
    assert [line["step"] for line in lines] == [*range(3, last, 3), last]
    for line in lines:
        assert {"train/loss", "train/accuracy", "train/exact_accuracy", "bp_steps"} <= line.keys()
        assert line["train/lr"] == 1e-2
    assert [line["bp_steps"] for line in lines] == sorted(line["bp_steps"] for line in lines)
    assert (lines[0]["bp_steps"], lines[-1]["bp_steps"]) == (2, 5)
    assert lines[-1]["tokens"] > lines[0]["tokens"] > 0


@pytest.mark.parametrize(
    ("start", "is_named", "workers", "checkpoint"),
    [
        (start_interpreter, True, 1, "fsdp2_step_7"),
        (start_command, False, 0, "fsdp2_step_35"),
    ],
    ids=["in the first epoch, named", "in the second epoch, without a name"],
)
def test_a_killed_run_goes_on_as_if_it_never_stopped(
    start: Callable[..., Started],
    is_named: bool,
    workers: int,
    checkpoint: str,
    tmp_path: Path,
    whole: Path,
    settings: list[str],
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    command = [str(PRETRAIN), *settings, f"data_workers={workers}"] + ["run_name=a"] * is_named
    killed = start(*command, cwd=folder).wait(until_exists=f"checkpoints/data/*/{checkpoint}")
    assert killed.code == -signal.SIGKILL
    (run,) = folder.glob("checkpoints/data/*")
    assert not (run / "fsdp2_epoch_2").exists()
    (run / ".fsdp2_step_99").mkdir()  # as if it was killed while saving
    (run / "metrics.jsonl").open("a").write('{"step": 5')  # ... and while writing a line

    continued = start(*command, cwd=folder).wait().check()
    assert f"({'given' if is_named else CONTINUED})" in continued.stdout
    assert re.search(r"^continued +fsdp2_(step|epoch)_\d+, step \d+$", continued.stdout, re.M)
    assert [path.name for path in folder.glob("checkpoints/*/*")] == [run.name]
    assert not list(run.glob(".fsdp2_*"))
    assert lines_of(run) == lines_of(whole)
    for name in ("fsdp2_epoch_1", "fsdp2_epoch_2"):
        assert_same_tensors(tensors_of(run / name), tensors_of(whole / name))


def test_deterministic_kernels_change_nothing_on_a_cpu(
    whole: Path, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    line = (*settings, "run_name=again", "deterministic=true", "max_steps=21")
    run_pretrain(*line, cwd=tmp_path / "work").check()
    again = tmp_path / "work/checkpoints/data/again/fsdp2_step_21"
    assert_same_tensors(tensors_of(again), tensors_of(whole / "fsdp2_step_21"))


def test_a_finished_run_says_so_and_is_left_alone(whole: Path, settings: list[str]) -> None:
    before = files_in(whole)
    done = run_pretrain(*settings, "run_name=whole", cwd=whole.parents[2]).check()
    assert done.stdout.splitlines() == [
        "run         checkpoints/data/whole (given)",
        "finished already: 2 epochs; another run_name starts another run",
    ]
    assert done.stderr == ""
    assert files_in(whole) == before


def test_an_unfinished_run_is_continued_unless_a_new_one_is_asked_for(
    unfinished: Path, settings: list[str], whole: Path
) -> None:
    folder = unfinished.parents[2]
    another = run_pretrain(*settings, "new_run=true", cwd=folder).check()
    assert "(a new run; the name was drawn)" in another.stdout
    (new,) = set(unfinished.parent.iterdir()) - {unfinished}
    assert_same_tensors(tensors_of(new / "fsdp2_epoch_2"), tensors_of(whole / "fsdp2_epoch_2"))

    auto = [setting for setting in settings if setting != "linear=mkl"]
    continued = run_pretrain(*auto, cwd=folder).check()
    assert continued.stdout.startswith(f"run         checkpoints/data/whole ({CONTINUED})\n")
    assert re.search(r"^continued +fsdp2_epoch_1, step", continued.stdout, re.M)
    assert re.search(r"^linear +mkl \(as before\)$", continued.stdout, re.M)
    assert len(list(unfinished.parent.iterdir())) == 2
    assert lines_of(unfinished) == lines_of(whole)


def test_a_setting_that_changed_is_named_on_continuing(
    unfinished: Path, settings: list[str]
) -> None:
    arguments = (*settings, "run_name=whole", "weight_decay=0.2", "arch.bp_max_steps=4")
    done = run_pretrain(*arguments, cwd=unfinished.parents[2]).check()
    assert "weight_decay: was 0.1, now 0.2\n" in done.stdout
    assert "arch.bp_max_steps: was 5, now 4\n" in done.stdout


def start_from(whole: Path, data: Path, cwd: Path, *arguments: str) -> Path:
    """Starts a run from `whole`; returns the checkpoint before its first step."""
    run = run_pretrain(
        *("--config-name", "cfg_sft", f"data.path={data}", f"resume_from={whole}"),
        *("+checkpoint_path=tuned", "epochs=1", "checkpoint_start=true", *TINY, *arguments),
        cwd=cwd,
    ).check()
    assert re.search(r"^starts from +\S+fsdp2_epoch_\d", run.stdout, re.M)
    assert (cwd / "tuned/fsdp2_epoch_1").is_dir()
    return cwd / "tuned/fsdp2_step_0"


def test_resume_from_starts_a_new_run_from_weights_and_optimizer(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    started = start_from(whole, data, tmp_path, "resume_epoch=1")
    assert_same_tensors(tensors_of(started), tensors_of(whole / "fsdp2_epoch_1"))
    assert json.loads((started / "progress.json").read_text())["step"] == 0


def test_resume_from_can_take_the_averaged_weights_alone(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    started = start_from(whole, data, tmp_path, "weights_only_resume_from_ema=true")
    averaged = read_tensors(whole / "fsdp2_epoch_2/ema")
    assert_same_tensors(read_tensors(started / "model"), averaged)
    assert_same_tensors(read_tensors(started / "ema"), averaged)
    moments = read_tensors(started / "optimizer")
    assert not any(tensor.count_nonzero() for tensor in moments.values())


@pytest.mark.slow
@pytest.mark.dist
def test_the_two_node_line_trains_and_one_process_goes_on(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "work"
    folder.mkdir()
    line = (
        *("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}", "--nproc_per_node=1"),
        *(str(PRETRAIN), "arch/size@arch=nano", f"data.path={data}", "global_batch_size=512"),
        *("epochs=2", "lr_warmup_steps=0", "log_interval=1", "run_name=two", "device=cpu"),
    )
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    nodes = [
        start_command(
            *("-m", "torch.distributed.run", f"--node_rank={rank}", *line, "max_steps=3"),
            cwd=folder,
            environment=threads,
        )
        for rank in range(2)
    ]
    first, second = [node.wait().check() for node in nodes]
    assert "2 process(es)" in first.stdout and "stopped at step 3" in first.stdout
    assert second.stdout == ""
    run = folder / "checkpoints/data/two"
    assert len(list((run / "fsdp2_step_3/model").glob("__*.distcp"))) == 2

    alone = run_pretrain(*line[line.index(str(PRETRAIN)) + 1 :], cwd=folder).check()
    assert "fsdp2_step_3, step 3\n" in alone.stdout
    losses = [line["train/loss"] for line in lines_of(run)]
    assert losses[-1] < losses[0]
