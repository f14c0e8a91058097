"""The benchmark of tokenizing runs to its end, and says what it found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

SCRIPT = ROOT / "scripts/benchmark_tokenizing.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_measures_speed_and_memory(tmp_path: Path) -> None:
    sizes = ("made_bytes=30000", "corpus_bytes=30000")
    done = run(*sizes, "repeats=1", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    texts, turn, ratio, memory = done.stdout.splitlines()
    assert re.match(r"\d+ texts, 0\.0 MB; encode_batch is best with [\d,]+ at once", texts)
    assert (shown := re.search(r"ratio (\d\.\d\d)$", turn))
    assert ratio.startswith(f"ratio of throughput {shown[1]} ({shown[1]} to {shown[1]}), of CPU")
    assert (mebibytes := re.match(r"memory: at most (\d+) MiB resident, for 3\d,\d+ bytes", memory))
    assert 20 < int(mebibytes[1]) < 1024
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["texts=absent.jsonl", "repeats=-1"])
def test_bad_input_is_one_line(option: str) -> None:
    done = run(option)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
