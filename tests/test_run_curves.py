"""What runs have logged is read as it is, whatever their lines hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.run_curves import read_runs, training_seconds


def write_run(
    folder: Path, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> Path:
    """A run directory with these lines in metrics.jsonl."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        (folder / "all_config.yaml").write_text(yaml.safe_dump(dict(settings)))
    return folder


def line(step: int, **values: float) -> dict[str, float]:
    """A line of metrics.jsonl; of names, the first _ stands for the slash."""
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    return {"step": step, "epoch": 0, "tokens": 100 * step, **named}


def test_a_metric_is_read_from_the_lines_that_have_it(tmp_path: Path) -> None:
    lines = [line(1, train_loss=3.0), line(1, val_loss=4.0), line(2, train_loss=2.0)]
    (run,) = read_runs([write_run(tmp_path / "run", lines)])
    assert run.metrics() == ["train/loss", "val/loss"]
    assert run.series("train/loss") == ([0, 2], [3.0, 2.0])
    assert run.series("val/loss") == ([1], [4.0])


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    lines = [line(n, train_loss=loss) for n, loss in enumerate((1.0, float("nan"), float("inf")))]
    (run,) = read_runs([write_run(tmp_path / "run", lines)])
    assert run.series("train/loss") == ([0], [1.0])


def test_training_time_is_that_of_steps_alone() -> None:
    lines = [
        {"tokens": 100, "tokens_per_second": 50.0},
        {"tokens": 100},  # a validation
        {"tokens": 300, "tokens_per_second": 100.0},
    ]
    assert training_seconds(lines) == [2.0, 2.0, 4.0]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / project / "run", [line(1)]) for project in ("one", "two")]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]
    assert [run.name for run in read_runs(paths)] == ["one/run", "two/run"]
    with pytest.raises(ValueError, match=r"one.run is given twice; name each run once"):
        read_runs([paths[0], paths[0]])


def test_a_run_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no metrics yet"):
        read_runs([tmp_path])


def test_settings_are_flat_and_names_are_none_of_them(tmp_path: Path) -> None:
    settings = {"lr": 0.1, "arch": {"name": "ut", "H_override": {}}, "run_name": "a"}
    (run,) = read_runs([write_run(tmp_path / "run", [line(1)], settings)])
    assert run.settings == {"lr": "0.1", "arch.name": "ut"}
