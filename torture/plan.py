"""What is to happen to which run, drawn from a seed: the same for the same numbers, anywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

Where = Literal[
    "starting",
    "loading",
    "step",
    "update",
    "logging",
    "saving",
    "background saving",
    "any moment",
]
Kind = Literal[
    "killed",
    "data worker killed",
    "checkpoint writer killed",
    "checkpoint cut short",
    "checkpoint bit flipped",
    "checkpoint file deleted",
    "line of metrics torn",
    "data changed",
    "clock jumped",
    "disk full",
    "files limited",
    "read-only",
]
NETS = ("hrm", "transformer", "ut", "rins", "trm", "trm_match_recurrence")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
STEPS, DISTURBANCES = 40, 8  # of each run
CHECKPOINT_STEPS = 3
# One of so many events is chosen; a save has about 45.
MOST_EVENTS: dict[Where, int] = {
    "starting": 900,
    "loading": 5,
    "saving": 60,
    "background saving": 60,
}
CLOCK_DAYS = 400.0  # a jump is at most so long, forward or backward
IN_SAVING = ("checkpoint writer killed", "disk full", "files limited", "read-only")
# How often each is drawn. What is no plain kill but needs one to happen is done after SIGKILL.
SHARES: dict[Kind, int] = {"killed": 20, **dict.fromkeys(get_args(Kind)[1:], 1)}
PLACES: dict[Where, int] = {
    "saving": 5,
    "any moment": 3,
    "starting": 2,
    "loading": 2,
    "step": 1,
    "update": 1,
    "logging": 1,
}


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One thing that happens to a run, and when: after `count` events of a kind from a step on."""

    kind: Kind
    where: Where
    step: int
    count: int
    rank: int  # whose events are counted
    waits: bool  # it stands still there until it is hit; else it is hit a little later
    signal: str
    victims: tuple[int, ...]  # ranks
    data_workers: int
    share: float  # of whatever the kind divides: a file, a time, room on a disk

    @property
    def is_kill(self) -> bool:
        """Whether a process of the run is killed, or asked to end, from outside."""
        return self.kind not in ("disk full", "files limited", "read-only")

    @property
    def name(self) -> str:
        """The row of the table that it counts in."""
        if self.kind != "killed":
            return self.kind
        place = {"any moment": "at any moment", "update": "in a step", "step": "in a step"}
        return f"{self.signal} {place.get(self.where, f'while {self.where}')}"


@dataclass(frozen=True, slots=True)
class Life:
    """One run, and all that happens to it before it may end."""

    number: int
    net: str
    ranks: int
    accumulates: bool
    under_torchrun: bool  # which starts killed workers again by itself
    saves_beside: bool  # checkpoints are written by a process of its own
    disturbances: tuple[Disturbance, ...]

    @property
    def twin(self) -> str:
        """Runs of the same name compute the same."""
        return f"{self.net}-{self.ranks}{'-accumulating' if self.accumulates else ''}"

    @property
    def kills(self) -> int:
        return sum(each.is_kill for each in self.disturbances)

    def __str__(self) -> str:
        words = [f"{self.ranks} rank{'s' * (self.ranks > 1)}"]
        words += ["accumulating"] * self.accumulates + ["under torchrun"] * self.under_torchrun
        words += ["saving in the background"] * self.saves_beside
        return f"life {self.number}: {self.net}, {', '.join(words)}"


def draw_life(seed: int, number: int) -> Life:
    """Nets, ranks and accumulation take turns; the rest is chance."""
    draw = random.Random(f"{seed} {number}")
    ranks = 1 + (number + number // len(NETS)) % 2
    accumulates = (number // 2 + number // (2 * len(NETS))) % 2 == 1
    under_torchrun = ranks > 1 and draw.random() < 0.25
    saves_beside = draw.random() < 0.3 / ranks  # costs seconds for each rank and start
    steps = sorted(draw.sample(range(1, STEPS - 6), DISTURBANCES))
    drawn = [_draw(draw, step, ranks, saves_beside=saves_beside) for step in steps]
    if under_torchrun:  # it answers for what happens to its workers
        drawn = [_to_one_worker(each) for each in drawn]
    net = NETS[number % len(NETS)]
    return Life(number, net, ranks, accumulates, under_torchrun, saves_beside, tuple(drawn))


def _draw(draw: random.Random, step: int, ranks: int, *, saves_beside: bool) -> Disturbance:
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    where = draw.choices(list(PLACES), list(PLACES.values()))[0]
    signal, waits = draw.choice(SIGNALS), draw.random() < 0.6
    rank, victim = draw.randrange(ranks), draw.randrange(ranks)
    hits_all = draw.random() < 0.5
    event, data_workers, share = draw.random(), draw.choice((0, 1)), draw.random()
    if kind == "checkpoint writer killed" and not saves_beside:
        kind = "killed"
    if kind == "data worker killed":
        where, data_workers, signal, waits = "loading", 1, "SIGKILL", True
    elif kind in IN_SAVING:
        where, signal, waits = "saving", "SIGKILL", True
    elif kind != "killed":
        where, signal, hits_all, waits = "logging", "SIGKILL", True, True
        step = max(step, CHECKPOINT_STEPS + 1)  # there is a checkpoint, and a line of metrics
    if where == "saving" and saves_beside:
        where = "background saving"
    return Disturbance(
        kind=kind,
        where=where,
        step=step,
        count=int(event * MOST_EVENTS.get(where, 2)),
        rank=rank,
        waits=waits,
        signal=signal,
        victims=tuple(range(ranks)) if hits_all else (victim,),
        data_workers=data_workers,
        share=share,
    )


def _to_one_worker(what: Disturbance) -> Disturbance:
    where = "step" if what.where == "any moment" else what.where
    return replace(what, kind="killed", where=where, victims=what.victims[-1:])
