"""Benchmarks made ready to be asked, in a thread that runs ahead of the generation."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from evaluation.answer_log import item_digest
from evaluation.benchmarks.protocol import DataSource, Item, Loaded
from evaluation.engines import Engine, Generation, Prompt
from evaluation.settings import BenchmarkPlan

OFFLINE = "; run_only=[reasoning_gym] measures without any download"
WAIT_S = 0.02  # between looks at what the other thread does
LISTED = 8  # categories that a note names


@dataclass(frozen=True, slots=True)
class Ready:
    """A benchmark with its prompts as the engine takes them."""

    plan: BenchmarkPlan
    generation: Generation  # as the engine takes it
    items: Sequence[Item]
    texts: Sequence[str]  # within their template
    prompts: Sequence[Prompt]
    too_long: frozenset[int]  # indices of items whose prompts leave no room for an answer
    digests: Sequence[str]
    data_fingerprint: str
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.plan.label


@dataclass(frozen=True, slots=True)
class Planned:
    """A benchmark to load."""

    plan: BenchmarkPlan
    generation: Generation
    notes: tuple[str, ...] = ()
    limit: int | None = None  # items, taken from all over the benchmark; None: all


class Loader:
    """Loads benchmarks one after the other in a thread of its own, as far ahead as it gets."""

    def __init__(
        self,
        planned: Sequence[Planned],
        source: DataSource,
        engine: Future[Engine],
        *,
        way_out: str = "",
    ) -> None:
        """Begins at once; prompts are prepared when the engine is there.

        `way_out` ends the message where data is missing.
        """
        self._ready: queue.SimpleQueue[Ready] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._way_out = way_out
        arguments = (tuple(planned), source, engine)
        threading.Thread(target=self._load, args=arguments, daemon=True).start()

    def check(self) -> None:
        """Raises what stopped the thread."""
        if self._failure is not None:
            raise self._failure

    def wait_for_first(self) -> None:
        """Until the first benchmark is there."""
        while self._ready.empty():
            self.check()
            time.sleep(WAIT_S)

    def next(self) -> Ready:
        """Waits for the next benchmark, in the order given."""
        while True:
            try:
                return self._ready.get(timeout=WAIT_S)
            except queue.Empty:
                self.check()

    def _load(self, planned: Sequence[Planned], source: DataSource, engine: Future[Engine]) -> None:
        try:
            for each in planned:
                self._ready.put(make_ready(each, source, engine))
        except FileNotFoundError as error:
            self._failure = FileNotFoundError(f"{error}{self._way_out}")
        except MemoryError:  # no affair of the batch size
            self._failure = ValueError("the data of the benchmarks does not fit into memory")
        except BaseException as error:  # raised again by the thread that asks
            self._failure = error


def make_ready(planned: Planned, source: DataSource, engine: Future[Engine]) -> Ready:
    """ValueError or FileNotFoundError names what is wrong with the data."""
    plan, generation = planned.plan, planned.generation
    loaded = of_limit(plan.benchmark.load(source), planned.limit)
    texts = [plan.prompt_of(item.prompt) for item in loaded.items]
    digests = [item_digest(*pair) for pair in zip(loaded.items, texts, strict=True)]
    fingerprint = loaded.fingerprint
    running = engine.result()
    prompts = running.prepare(texts, generation)
    context = running.context_of(generation)
    lengths = [running.num_tokens(prompt) for prompt in prompts] if context else []
    too_long = frozenset(
        index for index, length in enumerate(lengths) if context is not None and length >= context
    )
    notes = (*planned.notes, *loaded.notes)
    if too_long and context is not None:
        has_shots = "num_shots" in type(plan.benchmark).model_fields
        advice = "; ask with fewer shots" if has_shots else ""
        notes += tuple(too_long_notes(loaded.items, too_long, lengths, context, advice=advice))
    return Ready(
        plan, generation, loaded.items, texts, prompts, too_long, digests, fingerprint, notes
    )


def of_limit(loaded: Loaded, limit: int | None) -> Loaded:
    """`limit` items from beginning to end, so that they come from all categories."""
    total = len(loaded.items)
    if limit is None or limit >= total:
        return loaded
    items = [loaded.items[total * number // limit] for number in range(limit)]
    return Loaded(items, (*loaded.notes, f"{limit:,} of {total:,} items are asked"))


def too_long_notes(
    items: Sequence[Item],
    too_long: frozenset[int],
    lengths: Sequence[int],
    context: int,
    *,
    advice: str = "",
) -> Iterator[str]:
    """Which prompts the context is too small for, by category where there are any."""
    if len(too_long) == len(items):
        yield (
            f"none of the {len(items):,} prompts fits the context of {context:,} tokens (they have "
            f"{min(lengths):,} to {max(lengths):,}): all answers are empty, and the figures say "
            f"nothing about the model{advice}"
        )
        return
    yield (
        f"{len(too_long):,} of {len(items):,} prompts fill the context of {context:,} tokens (the "
        f"longest has {max(lengths):,}) and have an empty answer{advice}"
    )
    counts: dict[str, list[bool]] = {}
    for index, item in enumerate(items):
        if item.category is not None:
            counts.setdefault(item.category, []).append(index in too_long)
    whole = [f"{name} ({len(each):,})" for name, each in counts.items() if all(each)]
    parts = [
        f"{name} ({sum(each):,} of {len(each):,})"
        for name, each in counts.items()
        if any(each) and not all(each)
    ]
    if whole:
        yield f"the context is too small for all prompts of {_listed(whole)}"
    if parts:
        yield f"the context is too small for some prompts of {_listed(parts)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
