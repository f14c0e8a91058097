"""Benchmarks while a run goes: chosen ones, asked of the averaged weights every so often.

Owns when, and the records; items and scoring are those of `evaluation.main`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from evaluation.chosen_benchmarks import ChosenBenchmarks
from evaluation.command_line import recorded_plan
from evaluation.judging import Sheet
from evaluation.loading import Ready
from evaluation.records import ResultsFolder, open_results
from evaluation.report_content import is_of_a_category
from evaluation.running import GaveWayError, Runner, Stopping
from evaluation.summary import lines_of, record_of, versions
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress
from training.telemetry import MetricsLogger, read_numbers
from training.validation import has_averages

RESULTS_DIR, STEP_NAME = "benchmarks", "step_{step}"  # in the run's folder
METRICS = "eval"  # in metrics.jsonl: eval/BENCHMARK/FIGURE


class _AtHand:
    """Hands out what is loaded already."""

    def __init__(self, ready: Sequence[Ready]) -> None:
        self._left = iter(ready)

    def check(self) -> None: ...

    def next(self) -> Ready:
        return next(self._left)


class BenchmarkWatch:
    """Asks a run its benchmarks now and then."""

    def __init__(
        self,
        chosen: ChosenBenchmarks,
        run_path: Path,
        logger: MetricsLogger,
        *,
        model: LanguageModel,
        optimizer: AdamATan2,
        start: Progress,
        epoch_ends: dict[int, int],
    ) -> None:
        """`epoch_ends`: epochs done, by the last step of each that is left."""
        self.chosen, self.run_path, self.logger, world = chosen, run_path, logger, logger.world
        self.model, self.optimizer = model, optimizer
        begins_epoch = start.cursor == 0
        self._epoch_ends = ({start.step: start.epoch} if begins_epoch else {}) | epoch_ends
        self._last_step = max(self._epoch_ends)
        # Rank 0 has cut the file to where the run stands; the others may read it before that.
        self._looked_at = int(world.broadcast(str(_last_look(logger.path))))
        if world.is_main:
            _remove_later(run_path / RESULTS_DIR, start.step)

    def is_due(self, step: int) -> bool:
        """Whether to look after this step; once. A look that gave way is due when continued."""
        if step == 0 or step == self._looked_at:
            return False
        config, epochs_done = self.chosen.config, self._epoch_ends.get(step, 0)
        is_time = bool(config.interval) and step % (config.interval or 1) == 0
        ends = bool(config.epochs and epochs_done) and epochs_done % (config.epochs or 1) == 0
        return is_time or ends or step == self._last_step

    def look(self, progress: Progress, stopping: Stopping | None = None) -> None:
        """Asks, scores and logs, with the weights as they stand; every rank calls it.

        Nothing of it is kept once `stopping` says that the run is to stop.
        """
        if stopping and stopping.is_wanted():
            return
        if self._ask(self.chosen.ready, progress, stopping):
            self._looked_at = progress.step

    def rehearse(self, progress: Progress) -> None:
        """The longest prompts of each benchmark, as many as are answered at a time."""
        size = self.chosen.config.batch_size * self.logger.world.size
        self._ask([_longest(each, size) for each in self.chosen.ready], progress, None)

    def _ask(self, ready: Sequence[Ready], progress: Progress, stopping: Stopping | None) -> bool:
        """Whether it came to its end."""
        world, engine = self.logger.world, self.chosen.engine
        folder = self.run_path / RESULTS_DIR / STEP_NAME.format(step=progress.step)
        aside = folder.with_name(f".{folder.name}.writing")
        weights = "ema" if has_averages(self.optimizer) else "raw"
        where = {
            "path": str(self.run_path),
            "checkpoint": None,
            "epoch": progress.epoch,
            "step": progress.step,
            "weights": weights,
        }
        with self.logger.clock_stopped(), engine.asked(self.model, self.optimizer, where):
            keeper = _Keeper(aside, self.chosen, folder.name) if world.is_main else None
            world.barrier()
            finish = keeper.finish if keeper else _nowhere
            source = _AtHand(ready)
            runner = Runner(engine, source, aside, finish, world, stopping=stopping, is_quiet=True)
            try:
                runner.run(self.chosen.streams)
            except GaveWayError:
                if keeper:
                    shutil.rmtree(aside)
                return False
            if keeper:
                keeper.publish(folder)
                self.logger.record(progress, keeper.figures)
        return True


class _Keeper:
    """Keeps the records of one look, on rank 0, in a folder such as `evaluation.main` makes."""

    def __init__(self, aside: Path, chosen: ChosenBenchmarks, name: str) -> None:
        engine = chosen.engine
        identity = engine.identity
        plans = list(chain(*chosen.streams))
        settings = {
            "engine": "SimpleEngine",
            "seed": 0,
            **{key: identity[key] for key in ("dtype", "depth", "max_context")},
            "limit": chosen.config.limit,
            "benchmarks": {each.plan.label: recorded_plan(each) for each in plans},
        }
        header = {
            "name": name,
            "model": identity,
            "engine": "SimpleEngine",
            "versions": versions(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "settings": settings,
        }
        shutil.rmtree(aside, ignore_errors=True)
        self.folder: ResultsFolder = open_results(aside, header, list(settings["benchmarks"]))
        self.figures: dict[str, float | None] = {}
        self._started_at = time.monotonic()

    def finish(self, sheet: Sheet) -> None:
        """A complete benchmark."""
        now = time.monotonic()
        record = record_of(sheet, now - sheet.started_at)
        self.folder.header["seconds"] = round(now - self._started_at, 3)
        self.folder.add(sheet.ready.label, record, lines_of(sheet))
        self.figures |= logged_figures(sheet.ready.label, record)

    def publish(self, folder: Path) -> None:
        """All of them are complete."""
        self.folder.remove_logs()
        shutil.rmtree(folder, ignore_errors=True)  # of a look whose metrics were lost with the run
        self.folder.path.rename(folder)


def _nowhere(sheet: Sheet) -> None:
    raise AssertionError("rank 0 alone finishes benchmarks")


def logged_figures(label: str, record: dict[str, Any]) -> dict[str, float | None]:
    """What metrics.jsonl gets of a benchmark: its headline first, no counts, no single subjects."""
    figures = {**record["published"], **record["robust"]}
    headline = record["headline"]
    names = [headline, *(name for name in figures if name != headline)]
    return {
        f"{METRICS}/{label}/{name}": float(figures[name])
        for name in names
        if name in figures and not is_of_a_category(name, record["categories"])
    } | {f"{METRICS}/{label}/invalid": record["invalid"] / record["n"]}


def _longest(ready: Ready, count: int) -> Ready:
    """Of the items that have room for an answer, those with the longest prompts."""
    there = [index for index in range(len(ready.items)) if index not in ready.too_long]
    chosen = sorted(there, key=lambda index: -len(ready.prompts[index]))[:count]
    parts = {name: [getattr(ready, name)[at] for at in chosen] for name in _PER_ITEM}
    return replace(ready, **parts, too_long=frozenset(), notes=())


_PER_ITEM = ("items", "texts", "prompts", "digests")


def _last_look(metrics: Path) -> int:
    """The step of the last figures in metrics.jsonl; -1 where there are none."""
    lines = read_numbers(metrics) if metrics.is_file() else []
    steps = [line["step"] for line in lines if any(key.startswith(f"{METRICS}/") for key in line)]
    return max(steps, default=-1)


def _remove_later(results: Path, last_step: int) -> None:
    """Drops what a continued run makes again, and what a killed one left half-written."""
    for folder in results.glob(f".{STEP_NAME.format(step='*')}.writing"):
        shutil.rmtree(folder)
    for folder in results.glob(STEP_NAME.format(step="[0-9]*")):
        if folder.is_dir() and int(folder.name.rpartition("_")[2]) > last_step:
            shutil.rmtree(folder)
