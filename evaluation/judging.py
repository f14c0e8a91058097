"""Verdicts in a thread of their own, so that a slow verifier holds no answer up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.answer_log import Given, Log, LogWriter
from evaluation.benchmarks.protocol import Verdict
from evaluation.loading import Ready


@dataclass(slots=True)
class Sheet:
    """A benchmark under way: what of it is answered and judged, by index of the item."""

    ready: Ready
    given: dict[int, Given] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    started_at: float = 0.0  # a clock reading

    @property
    def is_complete(self) -> bool:
        return len(self.verdicts) == len(self.ready.items)

    def unjudged(self) -> list[int]:
        return [index for index in self.given if index not in self.verdicts]

    def take_from(self, log: Log) -> None:
        """Fills in what is logged for these very items; answers to other prompts are passed by."""
        for index, item in enumerate(self.ready.items):
            key = (self.ready.label, item.id)
            given = log.answers.get(key)
            if given is not None and given.digest == self.ready.digests[index]:
                self.given[index] = given
                if key in log.verdicts:
                    self.verdicts[index] = log.verdicts[key]


class Judge:
    """Judges answers in the order in which they come, and logs the verdicts."""

    def __init__(self, writer: LogWriter, when_complete: Callable[[Sheet], None]) -> None:
        """`when_complete` is called in the judge's thread, once a sheet has all verdicts."""
        self._writer = writer
        self._when_complete = when_complete
        self._queue: queue.Queue[tuple[Sheet, Sequence[int]] | None] = queue.Queue()
        self._failure: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, sheet: Sheet, indices: Sequence[int]) -> None:
        """Answers that are on the sheet; none of them: looks whether the sheet is complete."""
        self._queue.put((sheet, indices))

    def check(self) -> None:
        """Raises what stopped the thread."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Until all that was put is judged."""
        self._queue.join()
        self.check()

    def give_up(self) -> None:
        """Leaves what waits unjudged; returns when nothing is judged any more."""
        self._failure = self._failure or InterruptedError("judging was given up")
        self._queue.join()

    def close(self) -> None:
        """Lets the thread end, after what was put before."""
        self._queue.put(None)

    def _work(self) -> None:
        while (put := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._judge(*put)
            except BaseException as error:  # raised again by the thread that puts
                self._failure = error
            finally:
                self._queue.task_done()

    def _judge(self, sheet: Sheet, indices: Sequence[int]) -> None:
        ready = sheet.ready
        for index in indices:
            item = ready.items[index]
            verdict = ready.plan.benchmark.judge(item, sheet.given[index].text)
            self._writer.verdict(ready.label, item, verdict)
            sheet.verdicts[index] = verdict
        if sheet.is_complete:
            self._when_complete(sheet)
