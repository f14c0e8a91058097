"""The benchmark of a training step compares like with like, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, start_command

SCRIPT = ROOT / "scripts/benchmark_training.py"


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_it_measures_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "figures" / "training.json"
    settings = ("sizes=nano", "rounds=1", "steps=2", "batch_sizes=8", "micro_batch_sizes=512")
    done = run(*settings, "bfloat16=true", "profile=true", f"output={output}", folder=tmp_path)
    assert done.returncode == 0 and "transformers, batch 8: " in done.stderr, done.stderr
    figures = json.loads(output.read_text())["nano"]
    assert figures["agreement"]["largest_relative_difference"] < 1e-4
    assert 900 < figures["tokens"] <= 2 * 512
    speed = figures["tokens_per_s"]
    ours, theirs = speed["ours, 512 tokens"], speed["transformers, batch 8"]
    assert figures["ratio"] == pytest.approx(ours / theirs)
    assert speed["ours in bfloat16, 512 tokens"] > 0
    for side in ("ours", "transformers"):
        assert sum(figures[f"shares, {side}"].values()) == pytest.approx(1.0)
    assert json.loads(done.stdout.removeprefix("nano: ")) == figures


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = start_command(str(SCRIPT), "sizes=huge", cwd=tmp_path).wait()
    assert done.code == 2
    assert done.stderr.startswith("error: sizes.0=huge: ")
    assert done.stderr.count("\n") == 1
