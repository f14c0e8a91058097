"""The benchmark of saving runs to its end, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

SCRIPT = ROOT / "scripts/benchmark_saving.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_measures_both_ways_by_turns(tmp_path: Path) -> None:
    output = tmp_path / "figures/saving.json"
    small = ("width=64", "layers=2", "tokens=16", "rounds=2", "steps=1")
    done = run(*small, f"folder={tmp_path}", f"output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert json.loads(done.stdout) == found
    assert {way: len(stalls) for way, stalls in found["all_stalls_s"].items()} == {
        "plain": 3,
        "background": 3,
    }
    stalls = found["stall_s"]
    assert found["ratio"] == pytest.approx(stalls["plain"] / stalls["background"])
    assert list(tmp_path.iterdir()) == [output.parent]  # what was saved is gone


@pytest.mark.slow
def test_bad_input_is_one_line() -> None:
    done = run("width=100")
    assert done.returncode == 2
    assert done.stderr == "error: width=100 is no multiple of 64, the size of a head\n"
