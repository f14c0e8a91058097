"""Figures that a run directory holds: the cost of its training, results of its evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_io.parsing import parse_json
from models.flops import training_flops_per_token
from models.transformer import NetConfig


@dataclass(frozen=True, slots=True)
class Figure:
    """One result of an evaluation."""

    benchmark: str
    metric: str
    value: float


def training_flops(metrics: Path, arch: NetConfig, vocab_size: int) -> float | None:
    """FLOPs of the steps in metrics.jsonl, without attention scores; None where there is none."""
    if not metrics.is_file():
        return None
    total, before = 0.0, 0
    for line in metrics.read_text().splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue  # a line cut off when the run was killed
        tokens = record.get("tokens")
        if "train/loss" not in record or not isinstance(tokens, int):
            continue
        steps = record.get("bp_steps")
        each = training_flops_per_token(arch, vocab_size, backprop_steps=steps, mean_keys=0)
        total, before = total + each * (tokens - before), tokens
    return total or None


def evaluation_figures(run: Path) -> tuple[Figure, ...]:
    """Numbers in a run's results/*/results.json by benchmark and metric; else none, silently."""
    figures = {}
    for path in sorted(run.glob("results/*/results.json")):
        try:
            content = parse_json(path.read_bytes())
        except ValueError:
            continue
        for figure in _figures_in(content):
            figures[figure.benchmark, figure.metric] = figure  # the newest folder's counts
    return tuple(figures.values())


def _figures_in(content: Any) -> Iterator[Figure]:
    """Numbers two levels deep, in `results` where there is such a key."""
    if not isinstance(content, dict):
        return
    held = content.get("results", content)
    for benchmark, metrics in held.items() if isinstance(held, dict) else ():
        for metric, value in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield Figure(str(benchmark), str(metric), float(value))
