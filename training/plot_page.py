"""One self-contained page that compares runs: tables, and a panel of curves for each metric.

Owns what is put into the page; plot_page.html and plot_page.js own how it looks and acts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.run_curves import RunCurves, training_seconds

TEMPLATE = Path(__file__).with_name("plot_page.html")
SCRIPT = Path(__file__).with_name("plot_page.js")
FIRST_SECTIONS = ("train", "val", "val_ema", "eval")
FINAL_SHARE = 0.05  # of a metric's lines are averaged into its final value
MAX_POINTS = 5000  # of a curve; longer ones are averaged a few lines at a time
LOWER_IS_BETTER = ("loss", "bits_per_byte")
HIGHER_IS_BETTER = ("accuracy", "exact_accuracy", "tokens_per_second")


def sections_of(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """All metrics that any run has, grouped by what stands before the slash."""
    grouped: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.metrics()):
        title = name.partition("/")[0] if "/" in name else "run"
        grouped.setdefault(title, []).append(name)
    first = [title for title in FIRST_SECTIONS if title in grouped]
    rest = sorted(grouped.keys() - first, key=lambda title: (title == "run", title))
    return [{"title": title, "metrics": grouped[title]} for title in (*first, *rest)]


def final_values(run: RunCurves) -> dict[str, float]:
    """Where a run stands, and the mean of each metric over its last lines."""
    last = run.lines[-1]
    found = {"step": last["step"], "tokens": last["tokens"]}
    found["seconds"] = training_seconds(run.lines)[-1]
    for name in run.metrics():
        _, values = run.series(name)
        tail = values[-max(1, round(len(values) * FINAL_SHARE)) :]
        if tail:
            found[name] = sum(tail) / len(tail)
    return found


def differing_settings(runs: Sequence[RunCurves]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with their values run by run."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = [{"name": key, "values": [run.settings.get(key, "") for run in runs]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def write_page(runs: Sequence[RunCurves], output: Path) -> None:
    """Writes the page; it loads nothing, from nowhere."""
    sections = sections_of(runs)
    metrics = [name for section in sections for name in section["metrics"]]
    in_table = [name for name in metrics if _is_lower_better(name) is not None]
    content = {
        "runs": [_run_content(run, metrics) for run in runs],
        "sections": sections,
        "final": [
            {"name": name, "isLowerBetter": _is_lower_better(name)}
            for name in ("step", "tokens", "seconds", *in_table)
        ],
        "finalNote": f"Metrics: mean over the last {FINAL_SHARE:.0%} of their lines. "
        "The best of several runs is bold.",
        "settings": differing_settings(runs),
        "note": "Pale: as logged; strong: smoothed, with the smoothed value in brackets. Drag to "
        "zoom, double-click for all. Training time leaves out what is not a training step. "
        f"Of more than {MAX_POINTS:,} lines, neighbours are averaged.",
    }
    text = json.dumps(content, allow_nan=False).replace("</", "<\\/")  # ends no script element
    page = TEMPLATE.read_text(encoding="utf-8").replace("__SCRIPT__", SCRIPT.read_text("utf-8"))
    output.write_text(page.replace("__DATA__", text), encoding="utf-8")


def _run_content(run: RunCurves, metrics: Sequence[str]) -> dict[str, Any]:
    series = {}
    for name in metrics:
        at, values = run.series(name)
        if values:
            series[name] = _thinned(at, values)
    return {
        "name": run.name,
        "step": [line["step"] for line in run.lines],
        "tokens": [line["tokens"] for line in run.lines],
        "seconds": [round(seconds, 1) for seconds in training_seconds(run.lines)],
        "series": series,
        "final": final_values(run),
    }


def _thinned(at: Sequence[int], values: Sequence[float]) -> dict[str, list[Any]]:
    """At most MAX_POINTS points, each the mean of neighbours, at the line in their middle."""
    size = -(-len(values) // MAX_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    middles = [at[min(start + size // 2, len(at) - 1)] for start in range(0, len(at), size)]
    return {"at": middles, "values": [float(f"{sum(p) / len(p):.6g}") for p in parts]}


def _is_lower_better(metric: str) -> bool | None:
    """None: neither is better, or it is no result."""
    last = metric.rpartition("/")[2]
    if metric.startswith("eval/"):
        return None if last == "invalid" or "_level_" in last else False
    if last in LOWER_IS_BETTER:
        return True
    return False if last in HIGHER_IS_BETTER else None
