"""The benchmark of generation runs to its end, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, start_command

SIDES = ("ours", "transformers")
SCRIPT = ROOT / "scripts/benchmark_generation.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_measures_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "figures" / "generation.json"
    done = run("quick=true", "prompts=16", "repeats=1", "batch_sizes=16", f"output={output}")
    assert done.returncode == 0 and "transformers, batch 16: " in done.stderr, done.stderr
    figures = json.loads(output.read_text())["nano"]
    generation = figures["generation"]
    ours, theirs = (generation["tokens_per_s"][f"{side}, batch 16"] for side in SIDES)
    assert generation["ratio"] == pytest.approx(ours / theirs)
    assert figures["multiple_choice"]["letters_agree"] == 1.0
    assert json.loads(done.stdout.removeprefix("nano: ")) == figures


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = start_command(str(SCRIPT), "sizes=huge", cwd=tmp_path).wait()
    assert done.code == 2
    assert done.stderr.startswith("error: sizes.0=huge: ")
    assert done.stderr.count("\n") == 1
