"""The figures of an evaluation: on record, and as a table for the terminal."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from evaluation.judging import Sheet
from evaluation.records import item_line
from training.environment import project_commit

PACKAGES = ("torch", "transformers", "math-verify", "reasoning_gym", "vllm")
HEADINGS = ("benchmark", "n", "figure", "%", "± se", "robust", "chance", "invalid", "over-long")


def record_of(sheet: Sheet, seconds: float) -> dict[str, Any]:
    """A complete benchmark as results.json has it."""
    ready = sheet.ready
    plan, benchmark, items = ready.plan, ready.plan.benchmark, ready.items
    given = [sheet.given[index] for index in range(len(items))]
    verdicts = [sheet.verdicts[index] for index in range(len(items))]
    figures = benchmark.figures(items, verdicts)
    categories: dict[str, dict[str, float]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        if item.category is not None:
            counts = categories.setdefault(item.category, {"n": 0, "correct": 0})
            counts["n"] += 1
            counts["correct"] += verdict.correct
    return {
        "benchmark": benchmark.name,
        "n": len(items),
        "headline": benchmark.headline,
        "published": figures.published,
        "robust": figures.robust,
        "robust_rule": benchmark.robust_rule,
        "standard_errors": figures.standard_errors,
        "chance": benchmark.chance(items),
        "invalid": sum(verdict.invalid for verdict in verdicts),
        "over_long": sum(each.finish_reason == "prompt_too_long" for each in given),
        "cut_off": sum(each.finish_reason == "length" and each.num_tokens > 1 for each in given),
        "notes": [*ready.notes, *figures.notes],
        "settings": benchmark.model_dump(mode="json"),
        "generation": dict(ready.generation),
        "prompt_template": plan.prompt_template,
        "data_fingerprint": ready.data_fingerprint,
        "categories": categories,
        "seconds": round(seconds, 3),
        "answer_tokens": sum(each.num_tokens for each in given),
    }


def lines_of(sheet: Sheet) -> list[dict[str, Any]]:
    """Its lines of items.jsonl, in the order of the items."""
    ready = sheet.ready
    return [
        item_line(ready.label, item, text, sheet.given[index], sheet.verdicts[index])
        for index, (item, text) in enumerate(zip(ready.items, ready.texts, strict=True))
    ]


def table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per benchmark, figures in per cent."""
    rows = [HEADINGS, *(_row(label, record) for label, record in records.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 2) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(label: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    headline = record["headline"]
    robust = record["robust"].get(f"{headline}_robust")
    return (
        label,
        f"{record['n']:,}",
        headline,
        _percent(record["published"].get(headline)),
        _percent(record["standard_errors"].get(headline)),
        _percent(robust),
        _percent(record["chance"]),
        f"{record['invalid']:,}",
        f"{record['over_long']:,}",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def versions() -> dict[str, str | None]:
    """Of what a figure may depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "project": project_commit()}


def told(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """The notes of all benchmarks as lines, each with its benchmark."""
    return [f"{label}: {note}" for label, each in notes.items() for note in each]
