"""What every benchmark is: a strict record of settings that loads items, judges answers, adds up.

Prompts, truths and scoring live in the benchmarks; reading data in `evaluation.mirror`, generating
in the engines.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

Row = Mapping[str, Any]  # one row of a data set


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a data set, as the hub names it."""

    dataset: str
    split: str
    config: str | None = None  # None: the data set has one configuration alone

    def __str__(self) -> str:
        return f"{self.dataset}/{self.config or 'default'}/{self.split}"


class DataSource(Protocol):
    """Where rows come from: `evaluation.mirror` has a local one and the hub."""

    def rows(self, split: Split, *, benchmark: str) -> Iterator[Row]:
        """In file order. FileNotFoundError says what `benchmark` lacks and how to get it."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and what its answer is judged by. All of it fits into JSON."""

    id: str  # unique in the benchmark, the same on every machine
    prompt: str  # as published: before template and stripping
    truth: Any  # what the benchmark's judge compares with
    letters: tuple[str, ...] = ()  # of the options, for multiple choice
    category: str | None = None  # subject, task, or problem that several samples answer


@dataclass(frozen=True, slots=True)
class Loaded:
    """The items, and what the report must say about them (shots clipped, texts that differ)."""

    items: list[Item]
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of prompts and truths: other data, other shots or another order change it."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.id, item.prompt, item.truth]).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, judged."""

    extracted: str | int | None  # what the published scoring read; None: unreadable
    correct: float  # published credit, 0 to 1
    invalid: bool
    robust: float | None = None  # credit under the robust rule; None: published is not in doubt
    problem: str | None = None  # a verifier that had to be stopped; the answer counts as wrong
    detail: Mapping[str, Any] = field(default_factory=dict)  # of the benchmark, fit for JSON


@dataclass(frozen=True, slots=True)
class Figures:
    """What the verdicts of a benchmark add up to."""

    published: dict[str, float]  # names and values of the published tables
    robust: dict[str, float] = field(default_factory=dict)  # `acc_robust`, ...
    standard_errors: dict[str, float] = field(default_factory=dict)  # by name of the figure
    notes: tuple[str, ...] = ()


class Benchmark(BaseModel, ABC):
    """One benchmark with its settings; `model_dump(exclude_unset=True)` is what a file asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    headline: ClassVar[str] = "acc"  # the figure that a table shows
    generation: ClassVar[Mapping[str, Any]] = {}  # generation settings of its own
    robust_rule: ClassVar[str | None] = None  # what acc_robust does otherwise, for the report

    @abstractmethod
    def splits(self) -> list[Split]:
        """All that `load` may read; `evaluation.fetch` mirrors them."""

    @abstractmethod
    def load(self, source: DataSource) -> Loaded:
        """ValueError names a row that cannot be asked."""

    @abstractmethod
    def judge(self, item: Item, answer: str) -> Verdict:
        """Never raises, whatever the model wrote."""

    @abstractmethod
    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        """Over items and verdicts in pairs; fewer verdicts than items are those judged so far."""

    def chance(self, items: Sequence[Item]) -> float | None:
        """What guessing earns in `headline`; None: next to nothing."""
        return None


def judge_all(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
    """The verdict of each answer, in order. There may be fewer answers than items, not more."""
    if len(answers) > len(items):
        raise ValueError(f"{benchmark.name}: {len(answers)} answers to {len(items)} items")
    return [benchmark.judge(item, answer) for item, answer in zip(items, answers, strict=False)]


def take(row: Row, column: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A column's value, or ValueError that names the row."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(row)}")
    if not isinstance(row[column], kind):
        raise ValueError(f"{where}: {column}={row[column]!r} is no {_named(kind)}")
    return row[column]


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(each.__name__ for each in kinds)
