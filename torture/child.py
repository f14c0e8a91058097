"""Runs pretrain.py, and waits where it is to be hit, limits its files or lets its clock jump.

    TORTURE='{"folder": ..., "orders": [...]}' python -m torture.child KEY=VALUE ...

Everything here acts from outside of the sources of training: what Python tells of files that are
opened and renamed (audit events), and the functions that a step consists of.
"""

from __future__ import annotations

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

import dataset_new
import training.saving
import training.step
import training.telemetry
from torture.plan import Where

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "TORTURE"
RELEASED = "released"  # file: whoever waits goes on
WAITS_S = 60.0  # at most
_STAGED = re.compile(r"/\.fsdp2_(?:step_(\d+))?")  # paths in a checkpoint that is not yet one
_WATCHED = {"training.checkpoint_writer": "torture.writer"}
_STARTING = ("open", "import", "os.", "socket.", "subprocess.", "shutil.")
_sleep, _now = time.sleep, time.monotonic  # the clock of this process may jump


@dataclass(frozen=True, slots=True)
class Orders:
    """What a process does with itself, and when: see Disturbance."""

    where: Where
    step: int
    count: int
    ranks: tuple[int, ...]  # that do it
    waits: bool
    file_bytes: int | None = None  # no file may grow larger, from then on
    jump_seconds: float = 0.0  # of all clocks, one step before

    def text(self) -> str:
        return json.dumps(asdict(self))


def reached_file(folder: Path, attempt: int) -> Path:
    """Is there when the moment has come; the number of the process stands in it."""
    return folder / f"reached.{attempt}"


def process_file(folder: Path, attempt: int, rank: int) -> Path:
    """Has the number of a rank's process."""
    return folder / f"process.{attempt}.{rank}"


def spent_file(folder: Path, attempt: int, rank: int) -> Path:
    """Has the seconds of CPU that a rank took to its end."""
    return folder / f"spent.{attempt}.{rank}"


class Moment:
    """Counts events, and acts once."""

    def __init__(self, orders: Orders, folder: Path, attempt: int, rank: int) -> None:
        self.orders, self.folder, self.attempt = orders, folder, attempt
        self.is_over = self.is_others = rank not in orders.ranks
        self.step, self.seen = 0, 0
        self.has_jumped = False

    def begin_step(self, step: int) -> None:
        self.step = step
        if self.orders.where == "starting":  # took fewer events: now, at the latest
            self.seen = max(self.seen, self.orders.count)
            self.happens("starting")
        is_due = self.orders.jump_seconds and step + 1 >= self.orders.step
        if is_due and not (self.has_jumped or self.is_others):
            self.has_jumped = True
            shift_clocks(self.orders.jump_seconds)

    def happens(self, where: Where) -> None:
        """An event of that kind: nothing, or the one that was waited for."""
        orders = self.orders
        if self.is_over or where != orders.where:
            return
        if where not in ("starting", "loading") and self.step < orders.step:
            return
        self.seen += 1
        if self.seen > orders.count:
            self.is_over = True
            self.act()

    def act(self) -> None:
        if self.orders.file_bytes is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            limits = (max(self.orders.file_bytes, 64), hard)  # the next line has to fit
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        aside = self.folder / f".reached.{os.getpid()}"
        aside.write_text(str(os.getpid()))
        aside.replace(reached_file(self.folder, self.attempt))
        deadline = _now() + WAITS_S
        while self.orders.waits and _now() < deadline and not self.released.exists():
            _sleep(0.001)

    @property
    def released(self) -> Path:
        return self.folder / f"{RELEASED}.{self.attempt}"


def shift_clocks(seconds: float) -> None:
    """All clocks of this process, from now on."""
    for name in ("time", "monotonic", "perf_counter"):
        plain = getattr(time, name)
        setattr(time, name, lambda plain=plain: plain() + seconds)


def watch_files(moment: Moment, saving: Where = "saving") -> None:
    """Events of starting (anything that the system is asked for) and of saving."""
    main_thread = threading.main_thread()

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if moment.is_over or not event.startswith(_STARTING):
            return
        if threading.current_thread() is main_thread:
            moment.happens("starting")
        staged = [found for each in arguments if (found := _STAGED.search(str(each)))]
        if staged and saving == "background saving":  # this process does not train
            moment.step = max(moment.step, *(int(found[1] or 0) for found in staged))
        if staged:
            moment.happens(saving)

    sys.addaudithook(hear)


def watch_writer() -> None:
    """The process that writes checkpoints is started as torture.writer."""

    def start(command: list[str], **settings: Any) -> subprocess.Popen[Any]:
        command = [_WATCHED.get(word, word) for word in command]
        return subprocess.Popen(command, **settings)

    replacement = SimpleNamespace(**{**vars(subprocess), "Popen": start})
    training.saving.subprocess = replacement  # pyright: ignore[reportAttributeAccessIssue]


def watch_steps(moment: Moment) -> None:
    """Events of the loop."""
    plain_step, plain_init = training.step.train_step, training.telemetry.MetricsLogger.__init__
    plain_add = training.telemetry.MetricsLogger.add
    plain_fill = dataset_new.PrefixLMDataset.fill_rows

    def train_step(*arguments: Any) -> Any:
        moment.begin_step(moment.step + 1)
        moment.happens("step")
        return plain_step(*arguments)

    def begin(logger: Any, *arguments: Any, start: Any, **settings: Any) -> None:
        moment.step = start.step
        plain_init(logger, *arguments, start=start, **settings)

    def add(logger: Any, *arguments: Any) -> None:
        moment.happens("logging")
        plain_add(logger, *arguments)

    def fill_rows(dataset: Any, rows: Any) -> Iterator[Any]:
        for each in plain_fill(dataset, rows):
            moment.happens("loading")
            yield each

    replace: Callable[[Any, str, Any], None] = setattr
    replace(training.step, "train_step", train_step)
    replace(training.telemetry.MetricsLogger, "__init__", begin)
    replace(training.telemetry.MetricsLogger, "add", add)
    replace(dataset_new.PrefixLMDataset, "fill_rows", fill_rows)
    register_optimizer_step_pre_hook(lambda *_: moment.happens("update"))


def moment_of_environment() -> Moment | None:
    """What the environment orders for this attempt and rank; None: nothing."""
    ordered = json.loads(os.environ[VARIABLE])
    number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if number >= len(ordered["orders"]):
        return None
    rank, attempt = int(os.environ.get("RANK", "0")), ordered["first"] + number
    return Moment(Orders(**ordered["orders"][number]), Path(ordered["folder"]), attempt, rank)


def run_pretrain(arguments: list[str]) -> None:
    """As `python pretrain.py ...`, with what the environment orders."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs beside ignore it
    ordered = json.loads(os.environ[VARIABLE])
    number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank, folder = int(os.environ.get("RANK", "0")), Path(ordered["folder"])
    process_file(folder, ordered["first"] + number, rank).write_text(str(os.getpid()))
    moment = moment_of_environment()
    if moment:
        watch_steps(moment)
        watch_files(moment)
        watch_writer()
    sys.argv = [str(ROOT / "pretrain.py"), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        attempt = ordered["first"] + number
        spent_file(folder, attempt, rank).write_text(str(time.process_time()))


if __name__ == "__main__":
    run_pretrain(sys.argv[1:])
