"""What is logged are exact averages over whole intervals, wherever the run was interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import ALONE

import training.telemetry
from models.loss import StepSums
from training.checkpoint import Progress
from training.distributed import World
from training.telemetry import METRICS_FILE, MetricsLogger, cut_metrics, read_metrics
from training.trackers import Tracker

TOKENS_A_STEP = 50


def sums(
    loss: float, *, tokens: tuple[int, int] = (1, 2), sequences: tuple[int, int] = (0, 1)
) -> StepSums:
    """One step; pairs are (correct, scored)."""
    counts = [torch.tensor(count) for count in (*tokens, *sequences)]
    return StepSums(torch.tensor(loss), *counts)


def random_sums(step: int) -> StepSums:
    draw = torch.Generator().manual_seed(step)
    scored, sequences = torch.randint(1, 1000, (2,), generator=draw).tolist()
    loss = float(torch.rand((), generator=draw)) * scored
    return sums(loss, tokens=(scored // 3, scored), sequences=(sequences // 7, sequences))


class Logging:
    """A logger of one run, with a step's values made up."""

    def __init__(
        self,
        path: Path,
        *,
        interval: int = 5,
        total_steps: int = 100,
        start: int = 0,
        world: World = ALONE,
        tracker: Tracker | None = None,
    ) -> None:
        self.file = path / METRICS_FILE
        self.logger = MetricsLogger(
            path,
            world,
            log_interval=interval,
            total_steps=total_steps,
            start=Progress(0, 0, start, start * TOKENS_A_STEP),
            tracker=tracker,
        )

    def add(self, step: int, what: StepSums | None = None, **values: float | None) -> None:
        progress = Progress(0, 0, step, step * TOKENS_A_STEP)
        self.logger.add(what or random_sums(step), progress, values or {"train/lr": step / 7})

    def lines(self) -> list[dict[str, Any]]:
        """What was written, but for what the clock says."""
        lines = read_metrics(self.file)
        for line in lines:
            del line["tokens_per_second"]
        return lines


def test_averages_are_sums_over_the_interval_divided_once(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=2)
    log.add(1, sums(30.0, tokens=(1, 10), sequences=(0, 2)))
    log.add(2, sums(10.0, tokens=(20, 30), sequences=(1, 1)), bp_steps=2)
    (line,) = log.lines()
    assert line == {
        "step": 2,
        "epoch": 0,
        "tokens": 2 * TOKENS_A_STEP,
        "train/loss": 1.0,  # not the mean of the two steps' averages
        "train/accuracy": 21 / 40,
        "train/exact_accuracy": 1 / 3,
        "bp_steps": 2,
    }


def test_an_interval_begins_anew_after_each_line(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=2)
    for step, loss in enumerate((4.0, 4.0, 1.0, 1.0), start=1):
        log.add(step, sums(loss))
    assert [line["train/loss"] for line in log.lines()] == [2.0, 0.5]


def test_the_last_step_is_logged_whatever_the_interval(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=4, total_steps=6)
    for step in range(1, 7):
        log.add(step)
    assert [line["step"] for line in log.lines()] == [4, 6]


def test_losses_are_added_in_double_precision(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=4)
    for step, loss in enumerate((2.0**24, 1.0, 1.0, 1.0), start=1):
        log.add(step, sums(loss, tokens=(0, 1)))
    assert log.lines()[0]["train/loss"] == (2**24 + 3) / 4


def test_steps_that_score_nothing_average_to_zero(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=1)
    log.add(1, sums(0.0, tokens=(0, 0), sequences=(0, 0)))
    assert log.lines()[0]["train/loss"] == 0.0


def test_values_that_a_net_does_not_have_are_left_out(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=1)
    log.add(1, **{"train/lr": 0.5, "bp_steps": None})
    (line,) = log.lines()
    assert line["train/lr"] == 0.5 and "bp_steps" not in line


def test_tokens_per_second_count_from_the_line_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((100.0, 102.0, 110.0))
    monkeypatch.setattr(training.telemetry.time, "monotonic", lambda: next(clock))
    log = Logging(tmp_path, interval=2, start=10)
    monkeypatch.setattr(log.logger, "_show", lambda *_: None)  # the bar looks at the clock too
    for step in (11, 12, 13, 14):
        log.add(step)
    speeds = [line["tokens_per_second"] for line in read_metrics(log.file)]
    assert speeds == [2 * TOKENS_A_STEP / 2.0, 2 * TOKENS_A_STEP / 8.0]


def test_time_off_the_clock_is_no_training_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 2.0, 3.0, 103.0, 106.0))
    monkeypatch.setattr(training.telemetry.time, "monotonic", lambda: next(clock))
    log = Logging(tmp_path, interval=1)
    monkeypatch.setattr(log.logger, "_show", lambda *_: None)
    log.add(1)
    with log.logger.clock_stopped():
        pass
    log.add(2)
    speeds = [line["tokens_per_second"] for line in read_metrics(log.file)]
    assert speeds == [TOKENS_A_STEP / 2.0, TOKENS_A_STEP / 4.0]


def test_it_tells_for_which_steps_a_line_is_due(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=4, total_steps=10)
    due = [step for step in range(1, 11) if log.logger.is_due(step)]
    for step in range(1, 11):
        log.add(step)
    assert due == [4, 8, 10] == [line["step"] for line in log.lines()]


def test_what_is_recorded_is_a_line_of_its_own(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=2)
    for step in (1, 2):
        log.add(step)
    log.logger.record(Progress(1, 0, 2, 100), {"val/loss": 1.5, "val/bits_per_byte": None})
    log.logger.record(Progress(1, 0, 3, 150), {"val/loss": 1.25})
    _, second, third = read_metrics(log.file)
    assert second == {"step": 2, "epoch": 1, "tokens": 100, "val/loss": 1.5}
    assert third == {"step": 3, "epoch": 1, "tokens": 150, "val/loss": 1.25}
    Logging(tmp_path, start=2)
    assert len(read_metrics(log.file)) == 2  # what was recorded past the restored step is cut too


def test_a_tracker_gets_the_same_lines(tmp_path: Path) -> None:
    class Listening(Tracker):
        heard: list[Any] = []

        def log(self, line: Mapping[str, Any]) -> None:
            self.heard.append(dict(line))

        def close(self) -> None:
            self.heard.append("closed")

    log = Logging(tmp_path, interval=1, tracker=Listening())
    log.add(1)
    log.logger.record(Progress(step=1), {"val/loss": 1.5})
    log.logger.close()
    assert [*read_metrics(log.file), "closed"] == Listening.heard


@pytest.mark.parametrize("saved_at", range(1, 12))
def test_a_run_that_was_interrupted_logs_what_one_does_that_was_not(
    tmp_path: Path, saved_at: int
) -> None:
    """The interval in whose middle the checkpoint lies included: equal to the last digit."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken = Logging(tmp_path / "whole"), Logging(tmp_path / "broken")
    for step in range(1, 13):
        whole.add(step)
        if step == saved_at:
            whole.logger.state()  # saving is no interruption
    for step in range(1, saved_at + 1):
        broken.add(step)
    saved = json.dumps(broken.logger.state())
    for step in range(saved_at + 1, 13):  # done again after the restart
        broken.add(step, sums(1e6))
    continued = Logging(tmp_path / "broken", start=saved_at)
    continued.logger.restore(json.loads(saved))
    for step in range(saved_at + 1, 13):
        continued.add(step)
    assert continued.lines() == whole.lines()
    assert [line["step"] for line in whole.lines()] == [5, 10]


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=1)
    for step in (1, 2):
        log.add(step)
    kept = log.lines()
    for torn in ('{"step": 3, "train/lo', '{"step"', "{", "\0\0\0"):
        with log.file.open("a") as file:
            file.write(torn)
        assert log.lines() == kept
        continued = Logging(tmp_path, interval=1, start=2)
        assert continued.lines() == kept
        assert log.file.read_text().endswith("}\n")
    continued.add(3)
    assert [line["step"] for line in log.lines()] == [1, 2, 3]


def test_a_last_line_without_its_end_is_not_joined_to_the_next(tmp_path: Path) -> None:
    log = Logging(tmp_path, interval=1)
    log.add(1)
    log.file.write_text(log.file.read_text().removesuffix("\n"))
    continued = Logging(tmp_path, interval=1, start=1)
    continued.add(2)
    assert [line["step"] for line in continued.lines()] == [1, 2]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no JSON"):
        read_metrics(file)


def test_lines_past_the_restored_step_are_cut(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    cut_metrics(file, 3)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4, 5)))
    cut_metrics(file, 3)
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    Logging(tmp_path, start=0)  # begun anew
    assert file.read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = Logging(tmp_path, interval=1, world=World(rank=1, size=1, device=ALONE.device))
    log.add(1)
    log.logger.record(Progress(step=1), {"val/loss": 1.0})
    assert not log.file.exists()
    log.logger.close()
    assert capfd.readouterr().err == ""


class CountingWorld(World):
    """Counts how often ranks add something up."""

    sums_made = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        CountingWorld.sums_made += 1
        return super().sum(values)


def test_ranks_and_devices_are_waited_for_only_where_a_line_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingWorld, "sums_made", 0)
    log = Logging(tmp_path, interval=5, world=CountingWorld(0, 1, ALONE.device))
    counts = []
    for step in range(1, 11):
        log.add(step)
        counts.append(CountingWorld.sums_made)
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


def test_no_tracker_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "tensorboard", "torch.utils.tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    log = Logging(tmp_path, interval=1)
    log.add(1)
    log.logger.close()
    assert len(log.lines()) == 1
