"""The benchmark of generation runs to its end, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import ROOT

SCRIPT = ROOT / "scripts/benchmark_generation.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_measures_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "figures" / "generation.json"
    done = run("quick=true", "prompts=5", "repeats=1", f"output={output}")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(output.read_text())["nano"]
    generation = figures["generation"]
    speeds = generation["tokens_per_s"]
    assert generation["best"] in speeds
    assert generation["ratio"] == speeds["ours"] / speeds[generation["best"]]
    assert figures["multiple_choice"]["letters_agree"] == 1.0
    assert f"ratio: {generation['ratio']:.2f}" in done.stdout


def test_bad_input_is_one_line() -> None:
    done = run("sizes=huge")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sizes.0=huge: ")
    assert done.stderr.count("\n") == 1
