"""What a run tells while it goes: sums of steps become averages, a bar, and metrics.jsonl.

Nothing here waits for the device but at the steps that are logged. A tracker gets the same lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_io.parsing import parse_json
from models.loss import StepSums
from training.checkpoint import Progress
from training.distributed import World
from training.publishing import write_atomically
from training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
_COUNTS = ("correct_tokens", "scored_tokens", "correct_sequences", "scored_sequences")


@dataclass(slots=True)
class _Totals:
    """Sums over all ranks and the steps of one logging interval; the loss in fp64."""

    loss: float = 0.0
    correct_tokens: int = 0
    scored_tokens: int = 0
    correct_sequences: int = 0
    scored_sequences: int = 0

    def averages(self) -> dict[str, float]:
        tokens, sequences = max(1, self.scored_tokens), max(1, self.scored_sequences)
        return {
            "train/loss": self.loss / tokens,
            "train/accuracy": self.correct_tokens / tokens,
            "train/exact_accuracy": self.correct_sequences / sequences,
        }


class MetricsLogger:
    """Adds up steps, and every `log_interval` of them writes a line and moves the bar."""

    def __init__(
        self,
        run_path: Path,
        world: World,
        *,
        log_interval: int,
        total_steps: int,
        start: Progress,
        tracker: Tracker | None = None,
    ) -> None:
        self.path = run_path / METRICS_FILE
        self.world = world
        self.tracker = tracker or Tracker()
        self.log_interval = log_interval
        self.total_steps = total_steps
        self._pending: list[StepSums] = []
        self._totals = _Totals()
        self._logged_at = time.monotonic()
        self._logged = start
        if world.is_main:
            cut_metrics(self.path, start.step)
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=start.step,
            unit="step",
            disable=not world.is_main,
            dynamic_ncols=is_terminal,
            mininterval=0.2 if is_terminal else 10.0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the sums of an interval in whose middle the checkpoint was saved."""
        if self.world.is_main and state:
            self._totals = _Totals(**state)

    def state(self) -> dict[str, Any]:
        """The sums of the interval so far, over all ranks; every rank calls it when it saves.

        What was written before is on the disk then: a continued run does not write it again.
        """
        self._collect()
        if self.world.is_main and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return {name: getattr(self._totals, name) for name in ("loss", *_COUNTS)}

    def is_due(self, step: int) -> bool:
        """Whether `add` writes a line for this step."""
        return step % self.log_interval == 0 or step == self.total_steps

    def add(self, sums: StepSums, progress: Progress, values: Mapping[str, float | None]) -> None:
        """One step; `values` (lr, bp_steps) are logged as they are, None ones left out."""
        self._pending.append(sums)
        if not self.is_due(progress.step):
            return
        self._collect()
        if not self.world.is_main:
            return
        now = time.monotonic()
        tokens = progress.tokens - self._logged.tokens
        speed = {"tokens_per_second": round(tokens / max(1e-9, now - self._logged_at), 1)}
        averages = self._totals.averages()
        self._write(progress, {**averages, **values, **speed})
        self._show({**averages, **speed}, progress.step)
        self._logged_at, self._logged, self._totals = now, progress, _Totals()

    def record(self, progress: Progress, values: Mapping[str, float | None]) -> None:
        """A line of its own for what is measured now and then, such as val/loss.

        A step may have several lines: what reads metrics.jsonl goes by the names in them.
        """
        if self.world.is_main:
            self._write(progress, values)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside (validation, say) is not counted in tokens_per_second."""
        started_at = time.monotonic()
        yield
        self._logged_at += time.monotonic() - started_at

    def close(self) -> None:
        """Leaves the bar as it stands, and waits for the tracker."""
        self._bar.close()
        self.tracker.close()

    def _write(self, progress: Progress, values: Mapping[str, float | None]) -> None:
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "tokens": progress.tokens,
            **{name: value for name, value in values.items() if value is not None},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracker.log(line)

    def _collect(self) -> None:
        """Moves what is pending on the device into the totals. # sync: here, and only here."""
        if not self._pending:
            return
        losses = torch.stack([sums.loss for sums in self._pending]).cpu().double()
        counts = torch.stack(
            [getattr(sums, name) for name in _COUNTS for sums in self._pending]
        ).view(len(_COUNTS), -1)
        local = torch.cat((losses.sum()[None], counts.cpu().sum(1).double()))
        loss, *whole = self.world.sum(local).tolist()
        self._pending.clear()
        if self.world.is_main:
            self._totals.loss += loss
            for name, count in zip(_COUNTS, whole, strict=True):
                setattr(self._totals, name, getattr(self._totals, name) + int(count))

    def _show(self, line: Mapping[str, float], step: int) -> None:
        self._bar.set_postfix_str(
            f"loss {line['train/loss']:.3f}, token {line['train/accuracy']:.3f}, "
            f"exact {line['train/exact_accuracy']:.3f}, {line['tokens_per_second']:,.0f} tok/s",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one a line; a torn last line (a killed run) is left out."""
    found = []
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            if not isinstance(line, dict):
                raise ValueError(f"{text[:40]!r} is no object")
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
        found.append(line)
    return found


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: steps with numbers by name. ValueError for any other value."""
    lines = read_metrics(path)
    for number, line in enumerate(lines, start=1):
        for name, value in ({"step": None} | line).items():
            is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
            if not is_number:
                raise ValueError(f"{path}, line {number}: {name}={value!r:.40} is no number")
    return lines


def cut_metrics(path: Path, last_step: int) -> None:
    """Drops what a continued run writes again: lines past `last_step`.

    For any file whose lines are objects with a "step": metrics.jsonl, samples.jsonl.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(read_metrics(path), start=1):
        step = line.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{path}, line {number} says no step; remove that line")
        if step <= last_step:
            kept.append(line)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
