"""When a run saves inside an epoch, and when it stops before its end.

A signal never stops a step: the loop asks between steps, saves, and leaves. Asked a second time, a
process stops at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import torch

from training.distributed import World

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
EXIT_CODE = 75  # EX_TEMPFAIL: a signal stopped the run; the same command goes on with it


class StopRequests:
    """Takes signals over while it is entered, and knows the limits of the run."""

    def __init__(
        self,
        world: World,
        max_steps: int | None,
        max_minutes: float | None,
        spent: Callable[[], str | None] = lambda: None,
        has_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.world = world
        self.has_failed = has_failed  # whether saving did, as far as this rank knows
        self.spent = spent  # why nothing better is hoped for, the same on all ranks; None: it is
        self.max_steps = max_steps
        self.max_minutes = max_minutes
        self.exit_code = 0
        self._started_at = time.monotonic()
        self._received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        for name in SIGNALS:
            if hasattr(signal, name):  # not every system has all of them
                number = signal.Signals[name]
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reason(self, step: int) -> str | None:
        """Why to stop after this step, the same on all ranks; None: go on."""
        if self.max_steps is not None and step >= self.max_steps:
            return f"max_steps={self.max_steps}"
        if spent := self.spent():
            return spent
        here = [self._received is not None, self._is_late(), self.has_failed()]
        signalled, late, failed = self.world.sum(torch.tensor(here, dtype=torch.int32)).tolist()
        if failed:
            return "a checkpoint could not be written"  # the save that follows says why
        if signalled:
            self.exit_code = EXIT_CODE
            return self._received or "a signal to another rank"
        return f"max_minutes={self.max_minutes}" if late else None

    def is_complete(self, step: int) -> bool:
        """Whether `max_steps` are done, or nothing better is hoped for."""
        is_done = self.max_steps is not None and step >= self.max_steps
        return is_done or self.spent() is not None

    def outcome(self, step: int) -> str:
        """What to say of a run that stopped after this step."""
        goes_on = "a larger one" if self.is_complete(step) else "the same command"
        return f"stopped at step {step:,} ({self.reason(step)}); {goes_on} goes on"

    def is_wanted(self) -> bool:
        """Whether a signal or the clock asks to stop; the same on all ranks."""
        return self.reason(-1) is not None

    def is_wanted_here(self) -> bool:
        """The same of this process alone, without a word to the others."""
        return self._received is not None or self._is_late()

    def _is_late(self) -> bool:
        elapsed_minutes = (time.monotonic() - self._started_at) / 60
        return self.max_minutes is not None and elapsed_minutes >= self.max_minutes

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name


class SaveSchedule:
    """Whether a checkpoint is due after a step: every so many steps, or minutes."""

    def __init__(self, world: World, every_steps: int | None, every_minutes: float | None) -> None:
        self.world = world
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """The same on all ranks; the clock that counts is rank 0's."""
        is_due = self.every_steps is not None and step % self.every_steps == 0
        if self.every_minutes is not None and not is_due:
            is_late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
            is_due = self.world.broadcast(str(is_late)) == str(True)
        if is_due:
            self._saved_at = time.monotonic()
        return is_due
