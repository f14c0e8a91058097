"""The quick start as a user runs it: what it learns, what it leaves, and that it is done once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import start_command

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "quickstart.py"
FILES = ("quickstart.json", "curves.png", "metrics.jsonl", "all_config.yaml", "environment.json")


def quickstart(folder: Path, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *overrides], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_the_held_out_tasks(seed: int, tmp_path: Path) -> None:
    shown = quickstart(tmp_path, f"seed={seed}")
    run = tmp_path / "checkpoints/quickstart/nano-hrm"
    result = json.loads((run / "quickstart.json").read_text())
    assert len(result["accuracy_after"]) >= 4, "at least three tasks, and their mean"
    assert result["accuracy_before"]["mean"] < 0.02
    assert result["accuracy_after"]["mean"] >= 0.85, result
    assert result["items"] >= 300
    assert result["train_seconds"] > 0 and result["tokens_per_second"] > 0
    assert all((run / name).is_file() for name in FILES)
    assert shown.count(" -> ") == 6
    again = quickstart(tmp_path, f"seed={seed}")
    assert "done already" in again and "training:" not in again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "data"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("lrr=3", "did you mean lr?"),
        ("checkpoint_path=x", "is not for the quick start"),
        ("--cfg", "is not for the quick start"),
    ],
)
def test_a_wrong_setting_stops_it_before_anything_is_made(
    setting: str, told: str, tmp_path: Path
) -> None:
    done = start_command(str(SCRIPT), setting, cwd=tmp_path).wait()
    assert done.code == 2
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is half made"


def test_results_of_other_settings_are_not_shown_as_these(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints/quickstart/nano-hrm"
    run.mkdir(parents=True)
    (run / "quickstart.json").write_text(json.dumps({"settings": ["seed=1"]}))
    done = start_command(str(SCRIPT), "seed=2", cwd=tmp_path).wait()
    assert done.code == 2 and "was made with seed=1" in done.stderr
