"""A tiny comparison from beginning to end: stopped, continued, and what it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import composed, start_command

from evaluation.comparison import runs
from scripts import compare_architectures, make_reasoning_data

# Few steps of a tiny net: nothing is learnt, but everything is done.
OPTIONS = [
    *("nets=hrm:lr=1e-3,transformer:lr=1e-2", "steps=2", "seeds=0"),
    *("arch.n_layers=2", "arch.hidden_size=16", "arch.num_heads=2", "arch.intermediate_size=24"),
    *("global_batch_size=128", "lr_warmup_steps=1", "device=cpu"),
]


def make_data(folder: Path, *options: str) -> Path:
    sizes = ["train_per_task=60", "held_out_per_task=8", "validation_per_task=6", "epochs=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make", f"output={folder}", "tasks=ca", *sizes, *options])
        make_reasoning_data.main()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "ca")


class Processes:
    """Forked processes in place of new interpreters, which take seconds to start."""

    def __init__(self, cwd: Path, patch: pytest.MonkeyPatch) -> None:
        self.cwd = cwd
        self.started: list[list[str]] = []
        patch.setattr(runs, "run_to_its_end", self.run)
        patch.setattr(compare_architectures, "composed", self.compose)

    def run(self, command: list[str], log: Path) -> int:
        self.started.append(command)
        done = start_command(*command[1:], cwd=self.cwd).wait()
        log.write_text(done.stdout + done.stderr)
        return done.code

    @staticmethod
    def compose(recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
        words = (f"{key}={value}" for key, value in settings.items())
        return composed("--config-name", recipe, *words)


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    (tmp_path / "work").mkdir()
    return Processes(tmp_path / "work", monkeypatch)


def compare(output: Path, data: Path, *options: str) -> Path:
    """Runs the script in this process, as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["compare", f"output={output}", f"data.path={data}", *OPTIONS, *options]
        )
        compare_architectures.main()
    return output


def without_times(report: Path) -> dict[str, Any]:
    results = json.loads(report.read_text())
    del results["command"]
    for entry in results["entries"]:
        del entry["wall_seconds"], entry["cpu_seconds"]
    return results


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_to_the_same_results(
    tmp_path: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = make_data(tmp_path / "data")
    whole = compare(tmp_path / "whole", data)
    assert len(processes.started) == 2
    require_time, calls = runs.Bench.require_time, []

    def stop_in_the_middle(bench: runs.Bench) -> None:
        calls.append(bench)
        if len(calls) == 3:  # the first run is trained, and one of its checkpoints scored
            raise runs.StoppedError("max_minutes is over")
        require_time(bench)

    monkeypatch.setattr(runs.Bench, "require_time", stop_in_the_middle)
    with pytest.raises(SystemExit) as stopped:
        compare(tmp_path / "parts", data)
    assert stopped.value.code == compare_architectures.EXIT_CODE
    assert not list((tmp_path / "parts").glob("comparison*"))
    parts = compare(tmp_path / "parts", data)
    assert len(processes.started) == 4
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        assert (parts / name).is_file() and (whole / name).is_file()
    assert without_times(parts / "comparison.json") == without_times(whole / "comparison.json")

    # with a choice of learning rates: two more, one of them beyond the edge of the grid
    before = (whole / "comparison.md").read_text()
    compare(whole, data, "nets=hrm,transformer:lr=1e-2", "lrs=1e-3,4e-3", "name=tuned")
    assert len(processes.started) == 6
    assert (whole / "comparison.md").read_text() == before
    held_out_is_kept_from_tuning(whole)
    make_data(tmp_path / "other", "seed=1")
    shutil.rmtree(data)
    (tmp_path / "other").rename(data)
    with pytest.raises(SystemExit):
        compare(whole, data)
    assert "was trained on other data" in capsys.readouterr().err


def held_out_is_kept_from_tuning(output: Path) -> None:
    results = json.loads((output / "tuned.json").read_text())
    hrm, transformer = results["entries"]
    assert len(hrm["lr_tried"]) == 3 and transformer["lr_note"] == "given"
    assert hrm["items"] == {"ca": 8} and [point["step"] for point in hrm["points"]] == [1, 2]
    for path in (output / "runs").glob("hrm*.json"):
        parts = set(json.loads(path.read_text())["scores"])
        # 1e-3 was compared before, as given
        is_compared = any(f"_lr-{lr:g}_" in path.name for lr in (1e-3, hrm["lr"]))
        assert parts == ({"validation", "held_out"} if is_compared else {"validation"})


def test_a_run_that_fails_is_named_with_its_log(
    tmp_path: Path, data: Path, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as failed:
        compare(tmp_path / "output", data, "lr_warmup_steps=50")
    assert failed.value.code == 2
    told = capsys.readouterr().err
    assert "failed (exit code 2); see" in told
    assert "lr_warmup_steps=50" in Path(told.split("see ")[1].strip()).read_text()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("nets=hrm,gru", "gru does not exist"),
        ("match=time", "'time' is none of flops, tokens, parameters"),
        ("seeds=0,0", "names a value twice"),
        ("lrs=0", "0 must be above 0"),
        ("steps=x", "x"),
        ("max_step=3", "unknown key 'max_step'"),
        ("run_name=mine", "the comparison sets it"),
        ("data.path=nowhere", "nowhere"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_made(
    option: str,
    told: str,
    tmp_path: Path,
    data: Path,
    processes: Processes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        compare(tmp_path / "output", data, option)
    assert refused.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "output").exists() and not processes.started


@pytest.mark.slow
def test_processes_of_its_own_are_timed(tmp_path: Path, data: Path) -> None:
    output = compare(tmp_path / "output", data, "nets=transformer:lr=1e-2")
    (entry,) = json.loads((output / "comparison.json").read_text())["entries"]
    assert entry["cpu_seconds"][0] > 0 and entry["wall_seconds"][0] > 0
