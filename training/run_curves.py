"""What runs have logged, read for plots and tables: metrics by name, time spent, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_io.parsing import parse_yaml
from training.checkpoint import CONFIG_FILE
from training.schema import NAME_KEYS
from training.telemetry import METRICS_FILE, read_numbers

AXES = ("step", "epoch", "tokens")  # of every line; all else is a metric


@dataclass(frozen=True, slots=True)
class RunCurves:
    """What is known of a run."""

    name: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    settings: dict[str, str]  # by dotted key

    def metrics(self) -> list[str]:
        """The names of all metrics, in the order of their first lines."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        return [name for name in names if name not in AXES]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """The lines that have the metric, and its finite values there."""
        found = [
            (number, line[metric])
            for number, line in enumerate(self.lines)
            if math.isfinite(line.get(metric, math.nan))
        ]
        return [number for number, _ in found], [value for _, value in found]


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """The runs in these folders, named apart; ValueError where one has no metrics."""
    return [
        RunCurves(name, metrics_of(path), _settings(path))
        for name, path in zip(_names_apart(paths), paths, strict=True)
    ]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; ValueError where there are none, or one that says not how far it is."""
    path = run / METRICS_FILE
    if not path.is_file() or not (lines := read_numbers(path)):
        raise ValueError(f"{path} holds no metrics yet; give the folder of a run that has trained")
    for number, line in enumerate(lines, start=1):
        if missing := [name for name in AXES if name not in line]:
            raise ValueError(
                f"{path}, line {number} has no {missing[0]}, which every line is written with: "
                "remove that line"
            )
    return lines


def training_seconds(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds spent in training steps until each line, over all sittings of the run."""
    seconds, tokens, found = 0.0, 0, []
    for line in lines:
        if line.get("tokens_per_second"):  # else the line tells of no steps, but of a validation
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["tokens"]
        found.append(seconds)
    return found


def _names_apart(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many of the folders above as it takes to tell them apart."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path in paths if whole.count(path.resolve()) > 1)
        raise ValueError(f"{twice} is given twice; name each run once")
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(whole)


def _settings(run: Path) -> dict[str, str]:
    path = run / CONFIG_FILE
    if not path.is_file():
        return {}

    def flat(value: Any, key: str) -> dict[str, str]:
        if not isinstance(value, dict):
            return {key: str(value)}
        below = [flat(each, f"{key}.{name}" if key else str(name)) for name, each in value.items()]
        return {name: text for part in below for name, text in part.items()}

    try:
        settings = flat(parse_yaml(path.read_text()), "")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return {key: value for key, value in settings.items() if key not in NAME_KEYS}
