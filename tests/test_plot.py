"""Curves are drawn from metrics files, one or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.plot import draw_curves, smoothed


def write_run(folder: Path, num_lines: int) -> Path:
    folder.mkdir()
    lines = [
        {
            "step": 5 * number,
            "train/loss": 3.0 / (number + 1),
            "train/accuracy": number / num_lines,
            "train/exact_accuracy": 0.0,
        }
        for number in range(num_lines)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_two_runs_are_one_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "first", 200), write_run(tmp_path / "second", 3)]
    draw_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no metrics yet"):
        draw_curves([tmp_path], tmp_path / "curves.png")


def test_smoothing_keeps_ends_and_means() -> None:
    values = [float(number % 2) for number in range(200)]
    assert smoothed(values)[0] == values[0] and smoothed(values)[-1] == values[-1]
    assert all(abs(value - 0.5) < 0.1 for value in smoothed(values)[10:-10])
    assert smoothed([1.0]) == [1.0]
