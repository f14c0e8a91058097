"""The check of long runs sees what grows, is torn or left out; and a short run passes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_long_run import (
    ROOT,
    Look,
    Settings,
    faults_of,
    figures_of,
    lines_of,
    require_whole,
    slope,
)

SETTINGS = Settings(steps=1000)


def looks(
    *, kb_per_step: float = 0.0, handles_per_step: float = 0.0, jump_kb: int = 0
) -> list[Look]:
    return [
        Look(
            step=step,
            rss_kb=int(400_000 + kb_per_step * step + (jump_kb if step > 600 else 0)),
            workers_kb=1000,
            handles=int(12 + handles_per_step * step),
            threads=3,
            processes=1,
        )
        for step in range(10, 1010, 10)
    ]


def test_what_grows_is_told() -> None:
    def faults(seen: list[Look]) -> list[str]:
        return faults_of(figures_of(seen, SETTINGS), SETTINGS)

    assert faults(looks()) == [] and faults(looks(kb_per_step=0.5)) == []
    (grown,) = faults(looks(kb_per_step=1.5))
    assert grown.startswith("trainer_mb_per_1000_steps=1.4")
    (grown,) = faults(looks(handles_per_step=0.01))
    assert grown.startswith("handles grow from ")


def test_the_slope_is_that_of_most_and_not_of_a_jump() -> None:
    steps = list(range(100))
    assert slope(steps, [3 * step for step in steps]) == pytest.approx(3000)
    assert slope(steps, [500.0 * (step > 95) for step in steps]) == 0


def test_too_few_looks_are_no_result() -> None:
    with pytest.raises(ValueError, match="give more steps="):
        figures_of(looks()[:25], SETTINGS)


def test_a_step_left_out_or_twice_is_told(tmp_path: Path) -> None:
    lines = [{"step": step, "train/loss": 1.0} for step in (10, 20, 30, 35)]
    require_whole(lines)
    for broken in (lines[:1] + lines[2:], lines[:2] + lines[1:]):
        with pytest.raises(ValueError, match=r"metrics.jsonl has step \d+ where \d+ should be"):
            require_whole(broken)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"st')
    assert lines_of(tmp_path / "metrics.jsonl", may_be_torn=True) == [{"step": 10}]
    with pytest.raises(ValueError, match="ends in a torn line"):
        lines_of(tmp_path / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_of_1500_steps_is_flat_and_survives_kills(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "scripts" / "check_long_run.py"), "steps=1500", "kills=2"]
    # of so short a run the slope is noise: that of 20,000 steps is in benchmarks/long_run.json
    options = ["most_mb=8", f"output={output}", f"work={tmp_path}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["same_metrics"] and len(found["killed_at"]) > 0 and not found["faults"]
