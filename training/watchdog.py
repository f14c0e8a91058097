"""Finds the rank that keeps the others waiting, says where it is, and ends the run.

A thread of each rank leaves a sign of life in the store of the process group: the last step, how
many collectives it has begun, and where its main thread is. Steps wait for none of this. Where
nothing has moved for too long, the rank that is silent or has begun the fewest collectives hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from training.distributed import World

EXIT_CODE = 76  # EX_PROTOCOL: the ranks lost one another; the same command goes on
BEAT_S = 2.0  # between signs of life, at most
MISSED_BEATS = 3  # after a broken connection: so many, and a rank is gone
STORE_TIMEOUT = timedelta(seconds=10)
_NO_STORE = "rank 0, which keeps the store of all ranks, is gone"
_ROOT = Path(__file__).resolve().parents[1]
_COLLECTIVES = str(Path(dist.__file__).parent)
_BROKEN = ("gloo", "nccl", "onnection", "socket", "timed out", "timeout")  # collectives' errors
ADVICE = "the same command goes on from the newest checkpoint"


@dataclass(frozen=True, slots=True)
class Sign:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    beat: int  # another one each time
    step: int
    num_collectives: int  # begun so far
    is_waiting: bool  # in a collective
    place: str  # in our sources

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process})"

    @property
    def position(self) -> tuple[int, int]:
        return self.step, self.num_collectives


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest sign of a rank, and since when nothing has changed, by the clock of who looks."""

    sign: Sign
    silent_s: float  # no other sign since
    still_s: float  # neither a step nor a collective since


Known = dict[int, tuple[Sign, float, float]]  # by rank: its newest sign, new since, moved since


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which ranks are to blame, and what to say."""

    ranks: tuple[int, ...]
    message: str


def judge(seen: Mapping[int, Seen], limit_s: float) -> Verdict | None:
    """Who keeps the others waiting, once this was asked after `limit_s` without any progress.

    None: nobody that can be told from here, as when all ranks compute for long.
    """
    silent = [each for each in seen.values() if each.silent_s > limit_s / 2]
    if silent:
        told = [
            f"{each.sign.name} has not answered for {each.silent_s:.0f} s, {_last(each)}"
            for each in silent
        ]
        return Verdict(tuple(each.sign.rank for each in silent), "; ".join(told))
    if any(each.still_s < limit_s / 2 for each in seen.values()):
        return None
    fewest = min(each.sign.num_collectives for each in seen.values())
    behind = [each for each in seen.values() if each.sign.num_collectives == fewest]
    if len(behind) < len(seen):
        told = [
            f"{each.sign.name} has kept the others waiting for {each.still_s:.0f} s, {_last(each)} "
            f"at {each.sign.place}"
            for each in behind
        ]
        return Verdict(tuple(each.sign.rank for each in behind), "; ".join(told))
    if all(each.sign.is_waiting for each in seen.values()):
        waited_s, at = max(each.still_s for each in seen.values()), behind[0]
        return Verdict(
            tuple(seen),
            f"all {len(seen)} ranks have waited {waited_s:.0f} s in one collective, {_last(at)} at "
            f"{at.sign.place}: look at the network between them",
        )
    return None


def _last(seen: Seen) -> str:
    return f"after step {seen.sign.step:,}"


class Watchdog:
    """Watches over the ranks while it is entered; with one rank or no limit it does nothing.

    Set `step` after each step. Where it ends the process, it leaves `held` (a lock) before.
    """

    def __init__(
        self,
        world: World,
        limit_minutes: float | None,
        step: int = 0,
        *,
        held: AbstractContextManager[object] | None = None,
        advice: str = ADVICE,
    ) -> None:
        self.world = world
        self.held = held
        self.advice = advice
        self.limit_s = 60 * (limit_minutes or 0)
        self.beat_s = min(BEAT_S, self.limit_s / 15)
        self.step = step
        self._beat = 0
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.world.size > 1 and self.limit_s:
            self._store = _own_connection()
            self._tell(self._sign())
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        if is_broken_collective(error):
            self._end(self._missing() or str(error))
        self._left.set()
        self._thread.join(timeout=STORE_TIMEOUT.total_seconds())

    def _watch(self) -> None:
        """The thread."""
        position, moved_at = (-1, -1), time.monotonic()
        known: Known = {}
        while not self._left.wait(self.beat_s):
            sign = self._sign()
            if sign.position != position:
                position, moved_at = sign.position, time.monotonic()
            still_s = time.monotonic() - moved_at
            try:
                self._tell(sign)
                if self._store.check(["verdict"]):
                    self._carry_out(json.loads(self._store.get("verdict")))
                if still_s < MISSED_BEATS * self.beat_s:
                    known.clear()
                    continue
                seen = self._look(known)
            except RuntimeError as error:  # who keeps the store is gone, or does not answer
                if still_s > self.limit_s:
                    self._end(f"{_NO_STORE} ({error})")
                continue
            verdict = judge(seen, self.limit_s) if still_s > self.limit_s else None
            if verdict is not None:
                text = json.dumps(asdict(verdict))
                self._carry_out(json.loads(self._store.compare_set("verdict", "", text)))

    def _sign(self) -> Sign:
        self._beat += 1
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        assert dist.group.WORLD is not None
        return Sign(
            self.world.rank,
            platform.node(),
            os.getpid(),
            self._beat,
            self.step,
            dist.group.WORLD._get_sequence_number_for_group(),  # pyright: ignore[reportAttributeAccessIssue]
            frame is not None and frame.f_code.co_filename.startswith(_COLLECTIVES),
            _place(frame),
        )

    def _tell(self, sign: Sign) -> None:
        self._store.set(_key(sign.rank), json.dumps(asdict(sign)))

    def _look(self, known: Known) -> dict[int, Seen]:
        """All ranks that have begun, as they look from here since `known` was empty."""
        now = time.monotonic()
        for rank in range(self.world.size):
            if not self._store.check([_key(rank)]):
                continue
            sign = Sign(**json.loads(self._store.get(_key(rank))))
            before, new_at, moved_at = known.get(rank, (None, now, now))
            if before is None or sign.beat != before.beat:
                new_at = now
            if before is None or sign.position != before.position:
                moved_at = now
            known[rank] = (sign, new_at, moved_at)
        return {
            rank: Seen(sign, now - new_at, now - moved_at)
            for rank, (sign, new_at, moved_at) in known.items()
        }

    def _missing(self) -> str | None:
        """Which ranks are gone after a connection broke; a verdict ends this process meanwhile."""
        known: Known = {}
        try:
            self._look(known)
            time.sleep(MISSED_BEATS * self.beat_s)
            silent = [seen for seen in self._look(known).values() if seen.silent_s > 0]
        except RuntimeError:
            return _NO_STORE
        return "; ".join(f"{s.sign.name} is gone, last seen {_last(s)}" for s in silent) or None

    def _carry_out(self, verdict: Mapping[str, object]) -> None:
        """Ends this process; the ranks to blame print their stacks, the first of the others why."""
        blamed = verdict["ranks"]
        assert isinstance(blamed, list)
        others = [rank for rank in range(self.world.size) if rank not in blamed]
        if self.world.rank in blamed:
            print(f"stacks of rank {self.world.rank}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(2 * self.beat_s)  # the others read it too, before connections break
        is_speaker = self.world.rank == (others or blamed)[0]
        self._end(str(verdict["message"]) if is_speaker else None)

    def _end(self, message: str | None) -> NoReturn:
        """Leaves at once: what is still to be done in this process may wait for other ranks."""
        if message:
            print(f"error: {message}; {self.advice}", file=sys.stderr)
        if self.held is not None:
            self.held.__exit__(None, None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def is_broken_collective(error: BaseException | None) -> bool:
    """Whether another rank, or the way to it, is what failed."""
    if isinstance(error, dist.DistError):
        return True
    is_plain = type(error) is RuntimeError  # what gloo raises
    return is_plain and any(part in str(error).lower() for part in _BROKEN)


def _own_connection() -> dist.Store:
    """To the store that the process group was made with, for the thread alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        host, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False
    )
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _key(rank: int) -> str:
    return f"rank {rank}"


def _place(frame: FrameType | None) -> str:
    """The innermost line of our sources that a thread is in."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown place"
