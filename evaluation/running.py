"""Asks an engine the prompts of many benchmarks, in as few streams as their settings allow.

Owns what is asked by which process and what happens when memory runs out; benchmarks are loaded
ahead and answers judged in threads of their own.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from evaluation.answer_log import Given, Log, LogWriter, read_logs
from evaluation.engines import Answered, Asked, Engine, Generation, StreamKind
from evaluation.judging import Judge, Sheet
from evaluation.loading import Planned, Ready
from inference.requests import FinishReason
from training.distributed import World

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def in_streams(
    stream_of: Callable[[Generation], str], planned: Sequence[Planned]
) -> list[list[Planned]]:
    """The benchmarks by the stream in which they are asked, in order of first appearance."""
    streams: dict[str, list[Planned]] = {}
    for each in planned:
        streams.setdefault(stream_of(each.generation), []).append(each)
    return list(streams.values())


class ReadySource(Protocol):
    """What hands out the benchmarks: `evaluation.loading.Loader` while it loads them."""

    def check(self) -> None:
        """Raises what keeps it from going on."""
        ...

    def next(self) -> Ready: ...


class Stopping(Protocol):
    """What may ask to stop in the middle: `training.interrupts.StopRequests`."""

    def is_wanted_here(self) -> bool:
        """Of this process alone."""
        ...

    def is_wanted(self) -> bool:
        """Of any; all processes ask together."""
        ...


class GaveWayError(Exception):
    """The run was asked to stop, on all ranks; what is not finished is in the logs alone."""


@dataclass(slots=True)
class Runner:
    """Answers and judges benchmarks; `finish` is called on rank 0 for each that is complete."""

    engine: Engine
    loader: ReadySource
    folder: Path  # of the logs
    finish: Callable[[Sheet], None]
    world: World
    finished: dict[str, str] = field(default_factory=dict)  # label -> data fingerprint
    seed: int = 0
    stopping: Stopping | None = None  # None: nothing stops it but the end of the process
    is_quiet: bool = False  # what the benchmarks have to note is said already
    _log: Log = field(init=False)
    _writer: LogWriter = field(init=False)
    _judge: Judge = field(init=False)
    _bar: tqdm = field(init=False)
    _keys: Iterator[int] = field(init=False, default_factory=count)

    def run(self, streams: Sequence[Sequence[Planned]]) -> None:
        """All ranks call it with the same streams. Benchmarks come in the loader's order.

        GaveWayError on all of them where `stopping` asks for it.
        """
        self._log = read_logs(self.folder)
        self.world.barrier()  # before the first answer is logged
        self._writer = LogWriter(self.folder, self.world.rank)
        self._judge = Judge(self._writer, self._complete)
        try:
            for stream in streams:
                self._run_stream(stream)
        finally:
            self._writer.close()
            self._judge.close()

    def _run_stream(self, stream: Sequence[Planned]) -> None:
        kind = self.engine.kind_of(stream[0].generation)
        sheets: list[Sheet] = []
        tickets: dict[int, tuple[Sheet, int]] = {}
        with self._progress() as self._bar:
            source = self._asked(len(stream), sheets, tickets)
            with closing(answer_all(self.engine, source, kind, tell=self._warn)) as answers:
                for each in answers:
                    sheet, index = tickets.pop(each.key)
                    self._take(sheet, index, each.text, each.finish_reason, each.num_tokens)
                    if self.stopping and self.stopping.is_wanted_here():
                        break
        if self.stopping and self.stopping.is_wanted():
            self._judge.give_up()
            raise GaveWayError
        assert not tickets, "not all that was asked was answered"
        self._judge.wait()
        self.world.barrier()
        if self.world.size > 1 and self.world.is_main:
            self._gather(sheets)

    def _asked(
        self, num_benchmarks: int, sheets: list[Sheet], tickets: dict[int, tuple[Sheet, int]]
    ) -> Iterator[Asked]:
        """What this rank asks of the next benchmarks, each as soon as it is loaded."""
        for _ in range(num_benchmarks):
            sheet = self._sheet(self.loader.next())
            if sheet is None:
                continue
            sheets.append(sheet)
            yield from self._asked_of(sheet, tickets)

    def _asked_of(self, sheet: Sheet, tickets: dict[int, tuple[Sheet, int]]) -> Iterator[Asked]:
        ready = sheet.ready
        pending = [index for index in range(len(ready.items)) if index not in sheet.given]
        mine = pending[self.world.rank :: self.world.size]
        sheet.started_at = time.monotonic()
        if self.world.is_main:
            self._judge.put(sheet, sheet.unjudged())
        self._bar.total += len(mine)
        self._bar.set_description(ready.label, refresh=sys.stderr.isatty())
        for index in mine:
            reason = why_not_asked(ready, index)
            if reason is not None:
                self._take(sheet, index, "", reason, 0)
                continue
            key = next(self._keys)
            tickets[key] = (sheet, index)
            seed = seed_of(self.seed, ready.label, ready.items[index].id)
            yield Asked(key, ready.prompts[index], ready.generation, seed)

    def _sheet(self, ready: Ready) -> Sheet | None:
        """A sheet with what is logged; None for a benchmark that is on record already."""
        for note in () if self.is_quiet else ready.notes:
            self._tell(f"{ready.label}: {note}")
        if self.finished.get(ready.label) == ready.data_fingerprint:
            self._tell(f"{ready.label}: is on record already")
            return None
        if ready.label in self.finished:
            self._tell(f"{ready.label}: its data is not what it was; asked anew")
        sheet = Sheet(ready)
        sheet.take_from(self._log)
        if sheet.given:
            done, total = len(sheet.given), len(ready.items)
            self._tell(f"{ready.label}: {done:,} of {total:,} are answered already")
        return sheet

    def _take(
        self, sheet: Sheet, index: int, text: str, reason: FinishReason, num_tokens: int
    ) -> None:
        ready = sheet.ready
        given = Given(text, reason, num_tokens, ready.digests[index])
        self._writer.answer(ready.label, ready.items[index], given)
        sheet.given[index] = given
        self._judge.put(sheet, (index,))
        self._bar.update()
        self._judge.check()
        self.loader.check()

    def _complete(self, sheet: Sheet) -> None:
        if self.world.size == 1:
            self.finish(sheet)

    def _gather(self, sheets: Sequence[Sheet]) -> None:
        """Takes what the other ranks have logged, and finishes the benchmarks."""
        log = read_logs(self.folder)
        for sheet in sheets:
            sheet.take_from(log)
            assert sheet.is_complete, f"{sheet.ready.label}: the logs of some ranks are missing"
            self.finish(sheet)

    def _progress(self) -> tqdm:
        is_seen = sys.stderr.isatty()
        return tqdm(
            total=0,
            unit=" answers",
            smoothing=0,
            leave=not self.is_quiet,
            mininterval=0.1 if is_seen else 10,
            disable=not self.world.is_main or (self.is_quiet and not is_seen),
        )

    def _tell(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _warn(self, line: str) -> None:
        rank = f"rank {self.world.rank}: " if self.world.size > 1 else ""
        tqdm.write(f"{rank}{line}", file=sys.stderr)


def why_not_asked(ready: Ready, index: int) -> FinishReason | None:
    """Why there is an empty answer without asking; None: it is asked."""
    if index in ready.too_long:
        return "prompt_too_long"
    return "length" if ready.generation.get("max_tokens") == 0 else None


def seed_of(seed: int, label: str, item_id: str) -> int:
    """A seed for one prompt, whichever process asks it and when."""
    digest = hashlib.sha256(f"{seed}/{label}/{item_id}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def answer_all(
    engine: Engine, asked: Iterable[Asked], kind: StreamKind, *, tell: Callable[[str], None]
) -> Generator[Answered, None, None]:
    """Each answer as it comes. Where memory runs out, goes on with half as much at a time.

    ValueError where there is too little even for one prompt.
    """
    unanswered: dict[int, Asked] = {}
    source = iter(asked)
    while True:
        try:
            for answered in engine.answer(_taking(unanswered, source), kind):
                del unanswered[answered.key]
                yield answered
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = kind.halved()
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if smaller is None:
            raise ValueError(
                f"out of memory with {kind.size} {kind.unit} at a time ({reason:.200}); give a "
                "smaller generation_config.max_context. What is answered so far is kept"
            )
        tell(
            f"out of memory with {kind.size} {kind.unit} at a time: going on with {smaller.size}, "
            f"{len(unanswered)} are asked again ({reason:.120})"
        )
        kind = smaller
        _release_memory()


def _taking(unanswered: dict[int, Asked], source: Iterator[Asked]) -> Iterator[Asked]:
    """What an earlier attempt took and did not answer, then the rest of the source."""
    for each in chain(list(unanswered.values()), source):
        unanswered[each.key] = each
        yield each


def is_out_of_memory(error: Exception) -> bool:
    """CUDA says so with a class of its own, the CPU's allocator in the text of a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
