"""A bad step stops the run, is skipped, or is gone back for, the same however often it is stopped.

Runs of tests/poisoned_run.py: pretrain.py, with batches whose loss or gradient goes wrong.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, Done, start_command, write_tiny_data
from torch import Tensor

from data_io.row_planning import RowPacking
from data_io.sampled_format import SampledData
from dataset_new import PrefixLMDataset
from training.guards import GUARD_FILE
from training.telemetry import METRICS_FILE, read_metrics
from training.tensor_store import read_tensors

POISONED = str(Path(__file__).with_name("poisoned_run.py"))
BAD_STEP = 15
KINDS = ("model", "ema", "optimizer")
Tensors = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 27 steps."""
    return write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=125, epochs=1)


def cursors(data: Path, *, batch: int = 64, ranks: int = 1) -> list[int]:
    """`next_cursor` of each global batch."""
    packing = RowPacking.of_training(batch, ranks, target_only=True, micro=None)
    dataset = PrefixLMDataset(SampledData.open(data), packing, num_slots=64, epoch=0)
    return [row.next_cursor for row in dataset]


@pytest.fixture(scope="module")
def train(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Done, Path]]:
    """Trains with bad batches, named by the step and what is wrong with it; its directory."""
    ends = cursors(data)

    def trained(
        bad: dict[int, str],
        *arguments: str,
        folder: Path | None = None,
        killed_at: str | None = None,
    ) -> tuple[Done, Path]:
        folder = folder or tmp_path_factory.mktemp("run") / "work"
        folder.mkdir(exist_ok=True)
        poison = " ".join(f"{kind}@{ends[step - 1]}" for step, kind in bad.items())
        settings = (*TINY, f"data.path={data}", "epochs=1", "data_workers=0", "log_interval=1")
        done = start_command(
            *(POISONED, *settings, "checkpoint_path=run", "checkpoint_minutes=null", *arguments),
            cwd=folder,
            environment={"POISON": poison},
        ).wait(until_exists=killed_at)
        return done, folder / "run"

    return trained


def end_of(run: Path) -> Tensors:
    return {kind: read_tensors(run / "fsdp2_epoch_1" / kind) for kind in KINDS}


def assert_same(found: Tensors, expected: Tensors) -> None:
    for kind, tensors in expected.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[kind][name], tensor), f"{kind}: {name}"


def events(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / GUARD_FILE)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run / METRICS_FILE)}


@pytest.fixture(scope="module")
def clean(train: Callable[..., tuple[Done, Path]]) -> Path:
    """A run without bad batches, and without a word about guards."""
    done, run = train({})
    done.check()
    return run


@pytest.fixture(scope="module")
def skipped(train: Callable[..., tuple[Done, Path]]) -> Path:
    """A run that has skipped one bad batch."""
    done, run = train({BAD_STEP: "loss"}, "guard.policy=skip", "checkpoint_steps=4")
    done.check()
    return run


def test_without_a_bad_step_guards_change_nothing(
    clean: Path, train: Callable[..., tuple[Done, Path]]
) -> None:
    done, run = train({}, "guard.policy=rewind", "guard.spike_score=8")
    done.check()
    assert_same(end_of(run), end_of(clean))
    assert losses(run) == losses(clean)
    assert not (run / GUARD_FILE).exists() and not (clean / GUARD_FILE).exists()
    assert "guard" not in (clean / "fsdp2_epoch_1/progress.json").read_text()


@pytest.mark.parametrize(("kind", "step"), [("gradient", 1), ("spike", 24)])
def test_a_bad_step_stops_the_run_and_names_its_examples(
    kind: str, step: int, data: Path, train: Callable[..., tuple[Done, Path]]
) -> None:
    done, run = train({step: kind}, "guard.spike_score=20", "guard.policy=stop")
    assert done.code == 1 and "Traceback" not in done.stderr
    told = {"gradient": "gradient is not finite", "spike": "robust standard deviations above"}
    assert told[kind] in done.stderr
    (event,) = events(run)
    assert (event["step"], event["epoch"], event["action"]) == (step, 0, "stop")
    assert event["loss"] is not None
    assert (event["grad_norm"] is None) == (kind == "gradient")
    first, last = [0, *cursors(data)][step - 1 : step + 1]
    assert sorted(event["examples_of_ranks"][0]) == list(range(first, last))
    assert f"step {step}: " in done.stderr and event["inspect"] in done.stderr


def test_the_command_that_is_told_shows_the_examples(
    skipped: Path, data: Path, tmp_path: Path
) -> None:
    (event,) = events(skipped)
    python, *arguments = shlex.split(event["inspect"])
    assert python == "python"
    done = start_command(*arguments, cwd=tmp_path).wait().check()
    shown = [int(number) for number in re.findall(r"^(\d+): ", done.stdout, re.M)]
    assert shown == event["examples_of_ranks"][0]


def test_a_step_that_is_skipped_leaves_no_trace_but_its_number(skipped: Path, clean: Path) -> None:
    before, after = losses(clean), losses(skipped)
    assert set(before) - set(after) == {BAD_STEP}
    assert all(after[step] == before[step] for step in range(1, BAD_STEP))
    found, whole = end_of(skipped), end_of(clean)
    for name, tensor in whole["optimizer"].items():
        if name.startswith("step."):
            assert found["optimizer"][name] == tensor - 1
    assert not torch.equal(found["model"]["lm_head.weight"], whole["model"]["lm_head.weight"])
    lr = {line["step"]: line["train/lr"] for line in read_metrics(skipped / METRICS_FILE)}
    clean_lr = {line["step"]: line["train/lr"] for line in read_metrics(clean / METRICS_FILE)}
    assert clean_lr.items() >= lr.items()


def test_a_run_that_skipped_a_step_goes_on_bit_for_bit(
    skipped: Path, train: Callable[..., tuple[Done, Path]]
) -> None:
    bad = {BAD_STEP: "loss"}
    done, run = train(bad, "guard.policy=skip", f"max_steps={BAD_STEP + 2}")
    done.check()
    train(bad, "guard.policy=skip", folder=run.parent)[0].check()
    assert_same(end_of(run), end_of(skipped))
    assert losses(run) == losses(skipped)
    assert events(run) == events(skipped)


def test_going_back_for_one_step_alone_is_skipping_it(
    skipped: Path, train: Callable[..., tuple[Done, Path]]
) -> None:
    arguments = ("guard.policy=rewind", "guard.window=0", "checkpoint_steps=4")
    done, run = train({BAD_STEP: "gradient"}, *arguments)
    assert "back to fsdp2_step_12; steps 15 to 15 are passed over" in done.check().stdout
    assert_same(end_of(run), end_of(skipped))
    assert losses(run) == losses(skipped)


@pytest.mark.slow
def test_a_run_that_went_back_ends_the_same_wherever_it_was_stopped(
    train: Callable[..., tuple[Done, Path]],
) -> None:
    bad = {BAD_STEP: "gradient", 22: "loss"}
    arguments = ("guard.policy=rewind", "guard.window=2")
    done, whole = train(bad, *arguments)
    assert "back to fsdp2_step_0; steps 13 to 17 are passed over" in done.check().stdout
    assert "back to fsdp2_step_0; steps 20 to 24 are passed over" in done.stdout
    expected = end_of(whole)
    taken = losses(whole)
    assert set(range(1, max(taken) + 1)) - set(taken) == {*range(13, 18), *range(20, 25)}
    stopped, run = train(bad, *arguments, "checkpoint_steps=7", "max_steps=19")
    assert "back to fsdp2_step_7;" in stopped.check().stdout, "14 is in the window"
    state = json.loads((run / "fsdp2_step_19/progress.json").read_text())["log_state"]["guard"]
    assert (state["num_bad"], state["passed"]) == (1, [[13, 17]])
    done, _ = train(bad, *arguments, folder=run.parent)
    assert "back to fsdp2_step_19" in done.check().stdout
    assert_same(end_of(run), expected)
    assert losses(run) == taken
    assert [event["passed"] for event in events(run)] == [[13, 17], [20, 24]]
    killed, run = train(bad, *arguments, "checkpoint_steps=7", killed_at=f"run/{GUARD_FILE}")
    assert killed.code == -signal.SIGKILL
    train(bad, *arguments, folder=run.parent)[0].check()
    assert_same(end_of(run), expected)
    assert [event["passed"] for event in events(run)] == [[13, 17], [20, 24]]


def test_bad_steps_past_the_limit_stop_the_run(train: Callable[..., tuple[Done, Path]]) -> None:
    arguments = ("guard.policy=skip", "guard.limit=1")
    done, run = train({9: "loss", 12: "gradient"}, *arguments)
    assert done.code == 1
    assert "guard.limit=1" in done.stderr and "step 12: " in done.stderr
    assert [event["action"] for event in events(run)] == ["skip", "stop"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_go_back_together_for_a_step_that_is_bad_on_one(
    data: Path, tmp_path: Path
) -> None:
    bad_step, folder = 6, tmp_path / "work"
    folder.mkdir()
    end = cursors(data, batch=128, ranks=2)[bad_step - 1]
    done = start_command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", POISONED, *TINY),
        *("global_batch_size=128", f"data.path={data}", "epochs=1", "data_workers=0"),
        *("checkpoint_path=run", "checkpoint_steps=2", "log_interval=1", "guard.window=1"),
        *("guard.policy=rewind", "guard.spike_score=20"),
        cwd=folder,
        environment={"POISON": f"loss@{end}", "OMP_NUM_THREADS": "1"},
    ).wait()
    assert "back to fsdp2_step_4; steps 5 to 7 are passed over" in done.check().stdout
    (event,) = events(folder / "run")
    assert event["reason"] == "the loss of 1 of 2 ranks is not finite (rank 1: nan)"
    first, last = cursors(data, batch=128, ranks=2)[bad_step - 2 : bad_step]
    assert sorted(index for rank in event["examples_of_ranks"] for index in rank) == list(
        range(first, last)
    )
    assert all(event["examples_of_ranks"])
    steps = len(cursors(data, batch=128, ranks=2))
    assert set(losses(folder / "run")) == set(range(1, steps + 1)) - {5, 6, 7}
    for name, tensor in end_of(folder / "run")["optimizer"].items():
        if name == "step.lm_head.weight":
            assert tensor == steps - 3
