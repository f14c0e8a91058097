"""The folder of an evaluation: results.json, items.jsonl, and logs of answers while it runs.

results/<name>/results.json           what is finished, and with which settings
results/<name>/items.jsonl            a line per item of the finished benchmarks
results/<name>/answers.<rank>.jsonl   evaluation.answer_log; gone when all is finished
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_io.parsing import parse_json
from evaluation.answer_log import LOG_GLOB, Given, encoded, logged_labels, read_logs
from evaluation.benchmarks.protocol import Item, Verdict
from training.publishing import write_atomically

FORMAT = 1
RESULTS_FILE, ITEMS_FILE = "results.json", "items.jsonl"
# What makes a model another one; the rest of its description may change (a folder may move).
OTHER_MODEL = ("checkpoint", "epoch", "step", "weights", "net", "tokenizer_sha256")


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
                by_label.setdefault(_label_of(content, path), []).append(content)
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
        """Unless they hold answers of a benchmark that is not finished."""
        if logged_labels(read_logs(self.path)) <= self.finished.keys():
            for path in self.path.glob(LOG_GLOB):
                path.unlink()

    def _in_order(self, labels: Mapping[str, Any]) -> list[str]:
        earlier = [label for label in labels if label not in self.order]
        return [*earlier, *(label for label in self.order if label in labels)]


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """One process at a time writes results; ValueError where another does. A killed one holds none.

    Two of them would each leave the other's benchmarks out of results.json.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another evaluation; wait for it, or give another "
                "folder (name=..., or output=... of evaluation.core)"
            ) from None
        yield


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
        begun = stored["benchmarks"].keys() | logged_labels(read_logs(path))
        before = stored["settings"]["benchmarks"]
        stored["settings"]["benchmarks"] = {
            label: each for label, each in before.items() if label in begun
        }
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
        settings, before = header["settings"], stored["settings"]["benchmarks"]
        settings["benchmarks"] = {**before, **settings["benchmarks"]}
        earlier = [label for label in before if label not in order]
        folder.order = [*earlier, *order]
        header["started_at"] = stored["started_at"]
        header["seconds"] += stored["seconds"]
    header["settings_fingerprint"] = fingerprint(header["settings"])
    folder.save()
    return folder


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; benchmarks that only one of them has are no difference."""
    whose: dict[str, list[str]] = {}
    parts = [("", before, now)]
    parts += [
        (label, before["benchmarks"][label], now["benchmarks"][label])
        for label in now["benchmarks"]
        if label in before["benchmarks"]
    ]
    for label, earlier, later in parts:
        flat, other = _flat(earlier), _flat(later)
        for key in dict.fromkeys((*flat, *other)):
            if flat.get(key) != other.get(key):
                change = f"{key}={_short(flat.get(key))}, now {_short(other.get(key))}"
                whose.setdefault(change, []).append(label)
    return [
        change if labels == [""] else f"{change} ({', '.join(labels)})"
        for change, labels in whose.items()
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, but those of single benchmarks."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key != "benchmarks":
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "benchmarks":
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        stored = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; give another name=") from None
    is_ours = isinstance(stored, dict) and stored.get("format") == FORMAT
    if not is_ours or not _is_whole(stored):
        raise ValueError(f"{path} is no record of this evaluation; give another name=")
    return stored


def _is_whole(stored: Mapping[str, Any]) -> bool:
    """Whether a record has all that going on with it needs."""
    objects = [stored.get(name) for name in ("model", "settings", "benchmarks")]
    labels = objects[1].get("benchmarks") if isinstance(objects[1], dict) else None
    objects += [labels, *(labels.values() if isinstance(labels, dict) else ())]
    seconds = stored.get("seconds")
    is_timed = isinstance(seconds, int | float) and 0 <= seconds < 1e12
    return is_timed and "started_at" in stored and all(isinstance(each, dict) for each in objects)


def _label_of(content: bytes, path: Path) -> str:
    """The benchmark of a line of items.jsonl."""
    try:
        return str(parse_json(content)["benchmark"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} has a line that is no answered item ({content[:60]!r}); remove that line, or "
            "the folder"
        ) from None


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


def folder_name(text: str) -> str:
    """A name as one part of a path: that of a model on a hub has slashes."""
    return re.sub(r"[^\w.=+-]+", "__", text.strip("/")).lstrip(".") or "model"


def require_name(name: str) -> str:
    """ValueError for a name that is no plain folder name."""
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"name={name!r} names a folder in results/; it may not hold a slash")
    return name
