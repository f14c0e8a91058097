"""The planner's benchmark: what it measures, and that plans are near what it has kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from source_tree import ROOT

from scripts.benchmark_planner import CASES, LIMIT, allocated_in, main, planned
from scripts.run_benchmarks import read_record
from training.planning_devices import Device
from training.planning_speed import Fleet

KEPT = ROOT / "benchmarks/amd-epyc/full/planner.json"
HERE = Fleet(Device("cpu", memory_gib=16, tflops=0.1, link_gb_s=1, is_cuda=False), 1)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    record = read_record(KEPT)
    assert record is not None
    return record.found["cases"]


@pytest.mark.parametrize("name", CASES)
def test_the_plan_of_each_case_is_near_the_peak_that_was_measured(
    name: str, measured: dict[str, Any]
) -> None:
    plan, found = planned(CASES[name], HERE), measured[name]
    assert plan.peak.total == pytest.approx(found["allocated_bytes"], rel=0.05)
    whole = found["base_bytes"] + plan.peak_bytes
    assert whole == pytest.approx(found["peak_bytes"], rel=LIMIT)


def test_all_blocks_that_are_there_at_a_time_count() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(4000, dtype=torch.uint8)
        del first, second
        torch.empty(4500, dtype=torch.uint8)

    assert allocated_in(call) == 5000


@pytest.mark.parametrize("options", ["cases=[hrm,x]", "measure=x"])
def test_an_unknown_case_is_refused(options: str) -> None:
    with pytest.raises(ValueError, match=re.escape("cases=x does not exist; it is one of nano")):
        main([options])


@pytest.mark.slow
def test_a_case_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    script = ROOT / "scripts/benchmark_planner.py"
    command = [sys.executable, str(script), "cases=[nano]", "steps=1", f"output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["cases"].keys() == {"nano"} and found["steps"] == 1
    assert found["cases"]["nano"]["ratio"] == pytest.approx(1, rel=2 * LIMIT)
    assert "1 of 1 within 10%" in done.stdout or "off by more: nano" in done.stdout
