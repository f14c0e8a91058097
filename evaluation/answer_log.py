"""Logs of an evaluation under way: every answer and every verdict, as it comes.

Each process appends to a log of its own, a line at a time, so that a kill at any point loses the
line being written and nothing else. All processes read all logs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_io.parsing import parse_json
from evaluation.benchmarks.protocol import Item, Verdict

LOG_GLOB, LOG_NAME = "answers.*.jsonl", "answers.{rank}.jsonl"


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that is there."""

    text: str
    finish_reason: str
    num_tokens: int
    digest: str  # of the item that it answers


@dataclass(slots=True)
class Log:
    """What the logs of all ranks hold: answers and verdicts by benchmark and item."""

    answers: dict[tuple[str, str], Given] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)


class LogWriter:
    """Appends to the log of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / LOG_NAME.format(rank=rank)
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def answer(self, label: str, item: Item, given: Given) -> None:
        self._write({"benchmark": label, "id": item.id, "given": asdict(given)})

    def verdict(self, label: str, item: Item, verdict: Verdict) -> None:
        self._write({"benchmark": label, "id": item.id, "verdict": asdict(verdict)})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        content = encoded(line)
        if self._file.write(content) != len(content):
            raise OSError(f"{self._file.name} could not be written to its end: is the disk full?")


def read_logs(folder: Path) -> Log:
    """All that is logged; a last line that a kill cut off is left out. ValueError names others."""
    log = Log()
    for path in sorted(folder.glob(LOG_GLOB)):
        lines = path.read_bytes().split(b"\n")
        for number, content in enumerate(lines[:-1], start=1):  # what follows the last end is torn
            try:
                line = parse_json(content)
                key = (line["benchmark"], line["id"])
                if "given" in line:
                    log.answers[key] = Given(**line["given"])
                    log.verdicts.pop(key, None)  # it was of an earlier answer
                else:
                    log.verdicts[key] = Verdict(**line["verdict"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}:{number} is no line of answers; remove that line, or the folder"
                ) from None
    return log


def logged_labels(log: Log) -> set[str]:
    """The benchmarks that have answers in it."""
    return {label for label, _ in log.answers}


def item_digest(item: Item, prompt: str) -> str:
    """Tells an item with its prompt from what had the same id in other data."""
    content = json.dumps([prompt, item.truth, item.letters])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line of a JSONL file. Half a surrogate pair, which a model may write, stays escaped."""
    return (json.dumps(line) + "\n").encode()


def _drop_torn_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
