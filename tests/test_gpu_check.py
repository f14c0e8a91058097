"""The checks of scripts/gpu_check.py, as far as a CPU can run them: a lent GPU is too short of time
for mistakes in them."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import start_command
from source_tree import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def run(gpu_check: ModuleType, name: str, seconds: float = 600.0) -> dict:
    ends_at = time.monotonic() + seconds
    return gpu_check.run_check(name, gpu_check.Setting(torch.device("cpu"), True, ends_at))


@pytest.mark.parametrize(
    "name", ["attention_sdpa_fp32", "attention_sdpa_bf16", "golden_nets", "decoding", "optimizer"]
)
def test_a_check_passes_where_there_is_nothing_wrong(gpu_check: ModuleType, name: str) -> None:
    record = run(gpu_check, name)
    assert record["ok"] is True, record
    assert record["figures"]["errors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["nets", "bf16_training", "offload", "activation_checkpointing", "compile_block"],
)
def test_a_longer_check_passes_where_there_is_nothing_wrong(
    gpu_check: ModuleType, name: str
) -> None:
    record = run(gpu_check, name)
    assert record["ok"] is True, record


def test_a_check_that_does_not_apply_is_left_out_with_its_reason(gpu_check: ModuleType) -> None:
    record = run(gpu_check, "attention_varlen_bf16")
    assert (record["ok"], record["detail"]) == (None, "not CUDA")
    record = run(gpu_check, "optimizer", seconds=-1.0)
    assert (record["ok"], record["detail"]) == (None, "the time is used up")


def test_a_check_that_breaks_or_finds_a_fault_is_recorded(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(setting: object) -> dict:
        raise RuntimeError("no kernel image")

    def finds(setting: object) -> dict:
        return gpu_check.judge({"output": float("nan")}, 1e-3)

    monkeypatch.setitem(gpu_check.CHECKS, "optimizer", breaks)
    record = run(gpu_check, "optimizer")
    assert record["ok"] is False and "RuntimeError: no kernel image" in record["detail"]
    monkeypatch.setitem(gpu_check.CHECKS, "optimizer", finds)
    record = run(gpu_check, "optimizer")
    assert record["ok"] is False and "output" in record["detail"]
    assert record["figures"]["limit"] == 1e-3


def test_the_report_holds_every_check_and_says_whether_one_is_wrong(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "below" / "report.json"
    setting = gpu_check.Setting(torch.device("cpu"), True, time.monotonic() + 600)
    names = ["optimizer", "ceilings"]
    assert gpu_check.run_checks(names, setting, {"device": "none"}, out)
    report = json.loads(out.read_text())
    assert report["device"] == "none"
    assert [(check["name"], check["ok"]) for check in report["checks"]] == [
        ("optimizer", True),
        ("ceilings", None),
    ]
    monkeypatch.setitem(gpu_check.CHECKS, "ceilings", lambda setting: 1 / 0)
    assert not gpu_check.run_checks(names, setting, {}, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = start_command(str(SCRIPT), cwd=tmp_path).wait()
    assert done.code == 2
    assert done.stderr == "gpu_check: torch finds no CUDA device here\n"
