"""The folder of an evaluation: results.json, items.jsonl, and a log of answers while it runs.

    results/<name>/results.json         what is finished, and with which settings
    results/<name>/items.jsonl          a line per item of the finished benchmarks
    results/<name>/answers.<rank>.jsonl every answer and verdict as it comes; gone at the end

A log only grows, a line at a time, so that a kill loses the line being written and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.benchmarks.protocol import Item, Verdict
from training.checkpoint import write_atomically

FORMAT = 1
RESULTS_FILE, ITEMS_FILE = "results.json", "items.jsonl"
LOG_GLOB, LOG_NAME = "answers.*.jsonl", "answers.{rank}.jsonl"
# What makes a model another one; the rest of its description may change (a folder may move).
OTHER_MODEL = ("checkpoint", "epoch", "step", "weights", "net", "tokenizer_sha256")


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
                line = json.loads(content)
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


@dataclass(slots=True)
class ResultsFolder:
    """What is on record, and where."""

    path: Path
    header: dict[str, Any]  # name, model, engine, settings, ... of results.json
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # by label, in their order
    order: Sequence[str] = ()  # of the labels

    def save(self) -> None:
        """Writes results.json."""
        unfinished = [label for label in self.order if label not in self.finished]
        record = {
            "format": FORMAT,
            **self.header,
            "unfinished": unfinished,
            "benchmarks": {label: self.finished[label] for label in self._in_order(self.finished)},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path / RESULTS_FILE, text + "\n")

    def add(self, label: str, record: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """A benchmark is finished: its items go into items.jsonl, then its figures on record."""
        path = self.path / ITEMS_FILE
        by_label: dict[str, list[bytes]] = {}
        if path.is_file():
            for content in path.read_bytes().splitlines(keepends=True):
                by_label.setdefault(json.loads(content)["benchmark"], []).append(content)
        by_label[label] = [encoded(line) for line in lines]
        aside = path.with_name(f".{path.name}.writing")
        with aside.open("wb") as file:
            for each in self._in_order(by_label):
                file.writelines(by_label[each])
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        self.finished[label] = record
        self.save()

    def remove_logs(self) -> None:
        for path in self.path.glob(LOG_GLOB):
            path.unlink()

    def _in_order(self, labels: Mapping[str, Any]) -> list[str]:
        earlier = [label for label in labels if label not in self.order]
        return [*earlier, *(label for label in self.order if label in labels)]


def open_results(path: Path, header: dict[str, Any], order: Sequence[str]) -> ResultsFolder:
    """Goes on with a folder, or begins it.

    One with other settings is moved aside, which is said. ValueError where it belongs to another
    checkpoint. `header` has name, model and settings, in which benchmarks stand by their labels.
    """
    stored = _read(path / RESULTS_FILE)
    if stored is None and (path / ITEMS_FILE).exists():
        raise ValueError(
            f"{path} has items but no {RESULTS_FILE}; give another name=, or remove it"
        )
    if stored is not None:
        _require_same_model(path, stored["model"], header["model"])
        changes = changed_settings(stored["settings"], header["settings"])
        if changes:
            kept = _moved_aside(path)
            print(
                f"other settings than before ({'; '.join(changes)}): starting anew; "
                f"the earlier results are kept in {kept}"
            )
            stored = None
    path.mkdir(parents=True, exist_ok=True)
    folder = ResultsFolder(path, header, {}, order)
    if stored is not None:
        folder.finished = dict(stored["benchmarks"])
        settings = header["settings"]
        before = stored["settings"]["benchmarks"]
        settings["benchmarks"] = {**before, **settings["benchmarks"]}
        earlier = [label for label in stored["benchmarks"] if label not in order]
        folder.order = [*earlier, *order]
        header["started_at"] = stored["started_at"]
        header["seconds"] += stored["seconds"]
    header["settings_fingerprint"] = fingerprint(header["settings"])
    folder.save()
    return folder


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; benchmarks that only one of them has are no difference."""
    changes = _differences(
        {key: value for key, value in before.items() if key != "benchmarks"},
        {key: value for key, value in now.items() if key != "benchmarks"},
        "",
    )
    for label in before["benchmarks"].keys() & now["benchmarks"].keys():
        changes += _differences(before["benchmarks"][label], now["benchmarks"][label], label)
    return changes


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def item_digest(item: Item, prompt: str) -> str:
    """Tells an item with its prompt from what had the same id in other data."""
    content = json.dumps([prompt, item.truth, item.letters])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def item_line(
    label: str, item: Item, prompt: str, given: Given, verdict: Verdict
) -> dict[str, Any]:
    """A line of items.jsonl."""
    return {
        "benchmark": label,
        "id": item.id,
        "category": item.category,
        "prompt": prompt,
        "answer": given.text,
        "finish_reason": given.finish_reason,
        "extracted": verdict.extracted,
        "truth": item.truth,
        "correct": verdict.correct,
        "invalid": verdict.invalid,
        "robust": verdict.robust,
        "problem": verdict.problem,
        "detail": dict(verdict.detail),
    }


def encoded(line: Mapping[str, Any]) -> bytes:
    """A line of a JSONL file. Half a surrogate pair, which a model may write, stays escaped."""
    return (json.dumps(line) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; give another name=") from None
    is_ours = isinstance(stored, dict) and stored.get("format") == FORMAT
    if not is_ours or not {"model", "settings", "benchmarks", "started_at"} <= stored.keys():
        raise ValueError(f"{path} is no record of this evaluation; give another name=")
    return stored


def _require_same_model(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [key for key in OTHER_MODEL if before.get(key) != now.get(key)]
    prints = [each.get("weights_fingerprint") for each in (before, now)]
    if before.get("dtype") == now.get("dtype") and prints[0] != prints[1]:
        differing.append("weights_fingerprint")
    if differing:
        told = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in differing)
        raise ValueError(
            f"{path} holds results of another checkpoint: {told}. Give name=... for a folder of "
            "its own, or move that one away"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    keys = dict.fromkeys((*before, *now))
    prefix = f"{where}: " if where else ""
    return [
        f"{prefix}{key}={_short(before.get(key))}, now {_short(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _moved_aside(path: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kept = path.with_name(f"{path.name}.{stamp}")
    number = 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.{stamp}-{number}")
    path.rename(kept)
    return kept


def _drop_torn_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def folder_name(text: str) -> str:
    """A name as one part of a path: that of a model on a hub has slashes."""
    return re.sub(r"[^\w.=+-]+", "__", text.strip("/")).lstrip(".") or "model"


def require_name(name: str) -> str:
    """ValueError for a name that is no plain folder name."""
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"name={name!r} names a folder in results/; it may not hold a slash")
    return name
