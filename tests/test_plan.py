"""scripts/plan.py: plans without data and from it, refuses what makes no sense; and gpu_check's."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import TINY, resolved, write_tiny_data
from planning_cases import net
from source_tree import ROOT

from training.distributed import stop_world
from training.schema import RunConfig


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "scripts/plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    return module


def answer(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, config: RunConfig, *arguments: str
) -> None:
    """Runs the script; pretrain.py is not asked what its arguments mean."""
    monkeypatch.setattr(script, "composed", lambda _: (config, []))
    script.main(list(arguments))


def test_the_script_plans_without_data(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = resolved("data.path=nowhere", "compile=stack")
    kept = tmp_path / "plans/plan.json"
    options = ("gpu=h100", "gpus=16", "gpu_hour=2.5", "nodes=1,64", f"json={kept}")
    answer(script, monkeypatch, config, *options)
    said = capsys.readouterr()
    assert "data.path=nowhere is not here: planned from options" in said.err
    assert "16 x h100" in said.out and "at 2.5 a device and hour" in said.out
    assert [row["nodes"] for row in json.loads(kept.read_text())["nodes"]] == [1, 64, 64]
    answer(script, monkeypatch, config, "gpu=rtx4090", "memory_gb=48", "json=-")
    assert json.loads(capsys.readouterr().out)["device"]["memory_gib"] == 48


def test_the_script_plans_from_data_where_it_is(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    data = write_tiny_data(tmp_path / "data")
    config = resolved(*TINY, f"data.path={data}", "epochs=2")
    answer(script, monkeypatch, config, "gpu=h100", "json=-")
    found = json.loads(capsys.readouterr().out)
    assert found["total_steps"] == 27 and found["vocab_size"] == 512


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("gpu=h1000", "gpu=h1000"),
        ("gpus=0", "gpus=0"),
        ("mfu=1.5", "mfu=1.5"),
        ("gpus", "is no option|unknown"),
        ("nodes=1,x", "nodes"),
    ],
)
def test_the_script_says_what_is_wrong_with_an_option(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, option: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        answer(script, monkeypatch, resolved("data.path=nowhere"), option)


@pytest.mark.slow
def test_the_script_asks_pretrain_what_its_arguments_mean(script: ModuleType) -> None:
    config, _ = script.composed(["arch/size@arch=B", "micro_batch_size=8192"])
    assert config.arch.hidden_size == 1024 and config.micro_batch_size == 8192
    with pytest.raises(ValueError, match="did you mean"):
        script.composed(["arch/size@arch=B", "micro_batch_siz=8192"])


@pytest.mark.slow
def test_the_check_for_gpus_plans_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own steps, on a CPU: only the allocator's counter is missing here."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    assert spec is not None and spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = gpu_check
    spec.loader.exec_module(gpu_check)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    setting = gpu_check.Setting(torch.device("cpu"), True, float("inf"))
    assert gpu_check.run_check("memory_plan", setting)["detail"] == "measures a GPU"
    trial = gpu_check.MemoryTrial(
        net("hrm"), 512, 1024, num_micro=2, recomputed="block", offloads=True
    )
    planned_bytes, measured, moment = gpu_check.memory_of(trial, setting)
    stop_world()
    assert measured == 7 and planned_bytes > 2**20 and moment in ("backward", "reduction")
    for changes in gpu_check.MEMORY_CASES.values():
        assert gpu_check.MemoryTrial(**changes)
