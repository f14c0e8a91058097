"""One run from its first start to its end, disturbed as planned, then compared with its twin."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from torture.child import Orders, spent_file
from torture.damage import (
    DAMAGES,
    can_forbid_writing,
    can_mount,
    change_data,
    damage_checkpoint,
    read_only,
    resize_disk,
    small_disk,
    tear_metrics,
)
from torture.plan import CLOCK_DAYS, Disturbance, Life
from torture.processes import Ranks, said, start_ranks, start_torchrun
from torture.tiny_runs import DATA, LAST, RUN, arguments_of, differences, write_data
from training.checkpoint import read_checkpoint

DAY_S = 86_400
LIMIT_BYTES = 30_000  # less than the largest file of a checkpoint has
MOST_OF_A_RUN = 0.6  # of what it computes: the start, and some steps
REFUSED = 2  # exit code


@dataclass(slots=True)
class Tried:
    """What came of one disturbance."""

    what: Disturbance
    codes: list[int]  # with which the ranks ended; under torchrun nobody knows
    has_restarted: bool = False  # the same command went on, or had nothing left to do


@dataclass(slots=True)
class Report:
    """What came of a life."""

    life: Life
    tried: list[Tried] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether it ended as its twin, and on the way nothing was otherwise than promised."""
        return not self.problems


def train_twin(life: Life, folder: Path) -> float:
    """A run that nothing happens to; the seconds of CPU that it takes on a rank."""
    work = folder / "work"
    work.mkdir(parents=True)
    write_data(work / DATA, life)
    ranks = start_ranks(folder, arguments_of(life), None, attempt=0, ranks=life.ranks)
    if any(ranks.end()):
        told = said(folder, 0).strip().splitlines()[-1:]
        raise ValueError(f"{life} fails with nothing done to it; see {folder}: {told}")
    return float(spent_file(folder, 0, 0).read_text())


def live(life: Life, folder: Path, twin: Path, twin_s: float) -> Report:
    """Starts, disturbs and starts again, in `folder`."""
    (folder / "work").mkdir(parents=True)
    shutil.copytree(twin / "work" / DATA, folder / "work" / DATA)
    needs_disk = any(each.kind == "disk full" for each in life.disturbances) and can_mount()
    living = _Living(life, folder, twin_s)
    with small_disk(folder / "work" / RUN.parent, is_wanted=needs_disk):
        try:
            living.go()
            living.compare(twin / "work" / RUN)
        except (TimeoutError, ValueError, OSError) as error:
            living.report.problems.append(str(error))
    return living.report


class _Living:
    """A life under way."""

    def __init__(self, life: Life, folder: Path, twin_s: float) -> None:
        self.life, self.folder, self.twin_s = life, folder, twin_s
        self.run, self.arguments = folder / "work" / RUN, arguments_of(life)
        self.report = Report(life)
        self._attempt = 0
        self._must_say: str | None = None  # the damaged checkpoint that the next start names

    def go(self) -> None:
        if self.life.under_torchrun:
            self._go_under_torchrun()
        else:
            for what in self.life.disturbances:
                if self._is_possible(what) and not self._disturb(what):
                    return
        self._start_undisturbed()

    def compare(self, twin: Path) -> None:
        """With the run of the twin."""
        if (self.run / LAST).is_dir():
            found = [f"differs: {each}" for each in differences(self.run, twin)]
            self.report.problems += found
        else:
            self.report.problems.append(f"there is no {LAST}")

    def _is_possible(self, what: Disturbance) -> bool:
        return what.kind != "read-only" or can_forbid_writing()

    def _start(self, orders: Orders | None, what: Disturbance | None = None) -> Ranks:
        workers = f"data_workers={what.data_workers if what else 1}"
        self._attempt += 1
        how = {"attempt": self._attempt, "ranks": self.life.ranks}
        return start_ranks(self.folder, [*self.arguments, workers], orders, **how)

    def _start_undisturbed(self) -> None:
        codes = self._start(None).end()
        self._judge_start(codes, has_come=False)

    def _disturb(self, what: Disturbance) -> bool:
        """Whether the run is not at its end yet."""
        orders = orders_of(what)
        ranks = self._start(orders, what)
        try:
            process = None
            if orders:
                process = ranks.wait_for_moment(self._attempt)
                has_come = process is not None
            else:
                most_s = MOST_OF_A_RUN * self.twin_s
                has_come = not ranks.ends_within(what.share * most_s)
            if has_come:
                self._act(ranks, what, process)
            codes = ranks.end()
        finally:
            ranks.kill()
        self._judge_start(codes, has_come=has_come)
        if not has_come or not any(codes):  # it had no effect: in the last save, say
            return False
        self.report.tried.append(Tried(what, codes))
        self._aftermath(what, codes)
        return True

    def _judge_start(self, codes: list[int], *, has_come: bool) -> None:
        """Whether the start went on until it was disturbed; what it had to say was said."""
        told = said(self.folder, self._attempt)
        if has_come or not any(codes):
            if self.report.tried:
                self.report.tried[-1].has_restarted = True
        else:
            self._complain(f"ended by itself with {codes}: {told[-500:]}")
        if self._must_say and "\ncontinued " in told:
            if f"skipped a checkpoint: {self._must_say}" not in told.replace(f"{RUN}/", ""):
                self._complain(f"did not name {self._must_say}, which is damaged")
            self._must_say = None

    def _act(self, ranks: Ranks, what: Disturbance, process: int | None) -> None:
        number = signal.Signals[what.signal]
        if what.kind == "disk full" and can_mount():
            resize_disk(self.run.parent, int(what.share * LIMIT_BYTES))
        elif what.kind == "read-only":
            with read_only(self.run):
                ranks.release(self._attempt)
                if any(codes := ranks.end()):
                    self._require_refused(codes, "cannot be written to")
                    self._attempt_refused("nothing can be written to")
        elif what.kind in ("data worker killed", "checkpoint writer killed"):
            assert process is not None
            os.kill(process, number)
        elif what.is_kill:
            ranks.hit(number, what.victims, self._attempt)
        ranks.release(self._attempt)

    def _aftermath(self, what: Disturbance, codes: list[int]) -> None:
        """What is done before the same command is given again."""
        if what.kind in ("disk full", "files limited"):
            self._require_refused(codes, "a full disk")
            if can_mount() and what.kind == "disk full":
                resize_disk(self.run.parent, None)
        elif what.kind in DAMAGES:
            self._damage(what)
        elif what.kind == "line of metrics torn":
            tear_metrics(self.run)
        elif what.kind == "data changed":
            name, bring_back = change_data(self.folder / "work" / DATA, what.share)
            self._attempt_refused(f"(changed: {name})")
            bring_back()

    def _damage(self, what: Disturbance) -> None:
        damaged = damage_checkpoint(self.run, what)
        if damaged is None:
            return
        name, mend = damaged
        if any(_is_sound(path) for path in self.run.glob("fsdp2_*")):
            self._must_say = name.partition("/")[0]
            return
        self._attempt_refused("no checkpoint that can be continued from")
        mend()

    def _attempt_refused(self, told: str) -> None:
        """The same command says no, in one message, and why."""
        self._require_refused(self._start(None).end(), told)
        if told not in said(self.folder, self._attempt):
            self._complain(f"did not say {told!r}: {said(self.folder, self._attempt)[-500:]}")

    def _require_refused(self, codes: list[int], why: str) -> None:
        text = said(self.folder, self._attempt)
        if REFUSED not in codes or "Traceback" in text or "error: " not in text:
            self._complain(f"was not refused ({why}): {codes}, {text[-500:]}")

    def _complain(self, text: str) -> None:
        self.report.problems.append(f"start {self._attempt} {text}")

    def _go_under_torchrun(self) -> None:
        orders = [orders_of(what) for what in self.life.disturbances]
        self._attempt += 1
        first = self._attempt
        wanted = [each for each in orders if each]
        assert len(wanted) == len(orders)
        number = self.life.ranks
        ranks = start_torchrun(self.folder, self.arguments, wanted, attempt=first, ranks=number)
        try:
            for attempt, what in enumerate(self.life.disturbances, start=first):
                if ranks.wait_for_moment(attempt) is None:
                    break
                ranks.hit(signal.Signals[what.signal], what.victims, attempt)
                ranks.release(attempt)
                if self.report.tried:
                    self.report.tried[-1].has_restarted = True
                self.report.tried.append(Tried(what, []))
            self._judge_start(ranks.end(), has_come=False)
        finally:
            ranks.kill()
        self._attempt = first + len(orders)


def _is_sound(checkpoint: Path) -> bool:
    try:
        read_checkpoint(checkpoint).verify()
    except (ValueError, OSError):
        return False
    return True


def orders_of(what: Disturbance) -> Orders | None:
    """What the process of the run does itself; None: it is hit after a while."""
    if what.where == "any moment":
        return None
    days = CLOCK_DAYS * (2 * what.share - 1) if what.kind == "clock jumped" else 0.0
    is_limited = what.kind == "files limited" or (what.kind == "disk full" and not can_mount())
    return Orders(
        where=what.where,
        step=what.step,
        count=what.count,
        ranks=(what.rank,),
        waits=what.waits,
        file_bytes=int(what.share * LIMIT_BYTES) if is_limited else None,
        jump_seconds=days * DAY_S,
    )
