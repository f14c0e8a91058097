"""A CORE bundle on disk: which tasks it has, their rows, and what guessing earns in them.

    core.yaml            icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, ...
    eval_meta_data.csv   random baselines in per cent, by label
    eval_data/...        a JSONL file per task, where dataset_uri says

Only files below the bundle are read, whatever its core.yaml says.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
)

from data_io.parsing import parse_yaml
from evaluation.benchmarks.protocol import Row, take
from evaluation.mirror import read_rows

CORE_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
LABEL_COLUMN, BASELINE_COLUMN = "eval task", "random baseline"
FETCH = "`python -m evaluation.fetch bundle=DIR` gets the bundle where there is a network"
MOST_YAML_BYTES = 1 << 20

TaskType = Literal["multiple_choice", "schema", "language_modeling"]


def _only_one(value: Any) -> Any:
    """Bundles write the shots as a list of one number."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class TaskEntry(BaseModel):
    """One of core.yaml's `icl_tasks`; keys that nothing here reads are left alone."""

    model_config = ConfigDict(frozen=True)

    label: str = Field(min_length=1, max_length=200)
    dataset_uri: str = Field(min_length=1)
    num_fewshot: Annotated[NonNegativeInt, BeforeValidator(_only_one)]
    icl_task_type: TaskType
    continuation_delimiter: str = " "


@dataclass(frozen=True, slots=True)
class Example:
    """One row. What differs between its options is the context or the continuation.

    multiple_choice: one context, several continuations; schema: several contexts, one continuation;
    language_modeling: one of each.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int  # index of the right option; 0 where there is one alone

    @property
    def options(self) -> list[tuple[str, str]]:
        """(context, continuation) of each option."""
        return [
            (each, continuation) for each in self.contexts for continuation in self.continuations
        ]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The tasks of a bundle, checked as far as that goes without reading their rows."""

    folder: Path
    entries: tuple[TaskEntry, ...]
    baselines: Mapping[str, float]  # per cent

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """FileNotFoundError or ValueError says what is missing or wrong."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder.absolute()} is no folder; {FETCH}")
        entries = _entries(_needed(folder / CORE_FILE))
        baselines = _baselines(_needed(folder / BASELINES_FILE))
        lacking = [entry.label for entry in entries if entry.label not in baselines]
        if lacking:
            raise ValueError(
                f"{folder / BASELINES_FILE} has no random baseline of {', '.join(lacking[:8])}"
            )
        return cls(folder, entries, baselines)

    def chosen(self, labels: Sequence[str]) -> list[TaskEntry]:
        """The tasks of these labels, in the bundle's order; all where none is given."""
        known = [entry.label for entry in self.entries]
        for label in labels:
            if label not in known:
                raise ValueError(
                    f"{label!r} is no task of {self.folder}; it has {', '.join(known)}"
                )
        return [entry for entry in self.entries if not labels or entry.label in labels]

    def file_of(self, entry: TaskEntry) -> Path:
        """Its JSONL file. ValueError for a path that leads out of the bundle."""
        base = self.folder / DATA_FOLDER
        base = base if base.is_dir() else self.folder
        path = base / entry.dataset_uri
        if not path.resolve().is_relative_to(base.resolve()):
            raise ValueError(
                f"{self.folder / CORE_FILE}: dataset_uri={entry.dataset_uri[:200]!r} of "
                f"{entry.label} leads out of {base}; it is a path below that folder"
            )
        return _needed(path)

    def examples(self, entry: TaskEntry) -> list[Example]:
        """All rows, in file order. ValueError names a row that cannot be asked."""
        path = self.file_of(entry)
        rows = enumerate(read_rows(path), start=1)
        examples = [example_of(row, entry.icl_task_type, f"{path} row {at}") for at, row in rows]
        if not examples:
            raise ValueError(f"{path} has no rows")
        return examples

    def digest(self, entry: TaskEntry) -> str:
        """SHA-256 of the task's file and of what is asked of it."""
        digest = hashlib.sha256(entry.model_dump_json().encode())
        with self.file_of(entry).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def example_of(row: Row, kind: TaskType, where: str) -> Example:
    """A row of a JSONL file, checked."""
    if kind == "language_modeling":
        context = take(row, "context", str, where)
        example = Example((context,), (take(row, "continuation", str, where),), 0)
    elif kind == "schema":
        contexts = _texts(row, "context_options", where)
        continuation = take(row, "continuation", str, where)
        example = Example(contexts, (continuation,), _gold(row, len(contexts), where))
    else:
        choices = _texts(row, "choices", where)
        query = take(row, "query", str, where)
        example = Example((query,), choices, _gold(row, len(choices), where))
    if not all(each.strip() for each in example.continuations):
        raise ValueError(f"{where} has an empty continuation, which no token could be scored of")
    return example


def _texts(row: Row, column: str, where: str) -> tuple[str, ...]:
    values = take(row, column, list, where)
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: {column} is no list of two or more texts")
    return tuple(values)


def _gold(row: Row, num_options: int, where: str) -> int:
    gold = take(row, "gold", int, where)
    if isinstance(gold, bool) or not 0 <= gold < num_options:
        raise ValueError(f"{where}: gold={gold} is none of 0 to {num_options - 1}")
    return gold


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} is missing in the bundle; {FETCH}")
    return path


def _entries(path: Path) -> tuple[TaskEntry, ...]:
    if path.stat().st_size > MOST_YAML_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, which is no list of tasks")
    try:
        content = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no YAML: {error!s:.200}") from None
    tasks = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{path} has no list icl_tasks")
    entries = []
    for number, task in enumerate(tasks, start=1):
        try:
            entries.append(TaskEntry.model_validate(task))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the entry"
            raise ValueError(f"{path}: icl_tasks {number}: {key}: {first['msg']}") from None
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{path} lists {', '.join(twice)} twice")
    return tuple(entries)


def _baselines(path: Path) -> dict[str, float]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(io.StringIO(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV: {error}") from None
    columns = [name.strip().lower() for name in rows[0]] if rows else []
    if LABEL_COLUMN not in columns or BASELINE_COLUMN not in columns:
        raise ValueError(f"{path} has no columns 'Eval Task' and 'Random baseline'")
    label_at, baseline_at = columns.index(LABEL_COLUMN), columns.index(BASELINE_COLUMN)
    baselines = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) <= max(label_at, baseline_at) or not row[baseline_at].strip():
            continue
        label, value = row[label_at].strip(), row[baseline_at].strip()
        try:
            baselines[label] = float(value)
        except ValueError:
            raise ValueError(f"{path} row {number}: {value[:80]!r} is no number") from None
        if not 0 <= baselines[label] < 100:
            raise ValueError(f"{path} row {number}: {value} is no per cent from 0 to below 100")
    return baselines
