"""The guard over benchmarks: what is kept, what counts as worse, and the tables made from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

from scripts import run_benchmarks
from scripts.run_benchmarks import Record, cpu_name, kept_table, main, read_plan, read_record

SPEED = {"place": "sides/1/ratio", "what": "speed", "against": "the other"}
MEMORY = {"place": "memory", "what": "memory", "against": "weights", "best": "low"}
PLAN = {
    "one": {"script": "one", "full": "n=9", "small": "n=1", "figures": [SPEED, MEMORY]},
    "large": {"script": "one", "full": "n=99", "figures": [MEMORY]},
    "on_gpu": {"script": "one", "full": "n=1", "small": "n=1", "device": "cuda", "figures": []},
}
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- benchmarks/([\w-]+) -->\n(.*?)\n<!-- end -->", re.DOTALL)


class Machine:
    """A folder of kept figures, and scripts that find what they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.commands = folder, list[str]()
        self.found: list[tuple[float, float]] = []  # (speed, memory) of the coming runs
        (folder / "plan.yaml").write_text(json.dumps(PLAN))
        monkeypatch.setattr(run_benchmarks, "KEPT", folder)
        monkeypatch.setattr(run_benchmarks, "cpu_name", lambda: "ACME (R) 9-core")
        monkeypatch.setattr(run_benchmarks, "run_once", self.run_once)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run_once(self, command: str) -> Any:
        self.commands.append(command)
        speed, memory = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        return {"sides": [{}, {"ratio": speed}], "memory": memory}

    def run(self, *found: tuple[float, float], options: str = "") -> None:
        self.found, self.commands = list(found), []
        main(options.split())

    def kept(self, size: str = "small", name: str = "one") -> Record:
        record = read_record(self.folder / "acme-r-9-core" / size / f"{name}.json")
        assert record is not None
        return record


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_the_first_figures_are_kept_and_shown(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.run((2.5, 1.1))
    assert machine.kept().ratios == {"sides/1/ratio": [2.5], "memory": [1.1]}
    assert machine.kept().command == "scripts.benchmark_one n=1"
    out, err = capsys.readouterr()
    assert "| speed | the other | 2.50x | none |  |\n" in out
    assert "| memory | weights | 1.10 (low is good) | none |  |\n" in out
    assert "large: left out, it has no small settings (full=true)" in err
    assert "on_gpu: left out, it needs cuda" in err


@pytest.mark.parametrize(("found", "word"), [((1.9, 1.1), "speed"), ((2.5, 1.4), "memory")])
def test_what_is_worse_three_times_is_told_and_not_kept(
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    found: tuple[float, float],
    word: str,
) -> None:
    machine.run((2.5, 1.1))
    with pytest.raises(SystemExit) as ended:
        machine.run(found)
    assert ended.value.code == 1
    assert len(machine.commands) == 3
    out, err = capsys.readouterr()
    assert err.endswith(f"one: {word}: worse by {'24' if word == 'speed' else '21'}% "
                        "(tolerance 20%)\n")  # fmt: skip
    assert re.search(rf"\| {word} \|.* worse by 2[14]% \|", out)
    assert machine.kept().ratios["memory"] == [1.1]
    latest = read_record(machine.folder / "acme-r-9-core/latest/small/one.json")
    assert latest is not None and len(latest.ratios["memory"]) == 3


def test_one_bad_run_of_three_is_noise(machine: Machine) -> None:
    machine.run((2.5, 1.1))
    machine.run((1.0, 1.1), (2.4, 1.1), (2.5, 1.1))
    assert len(machine.commands) == 3
    machine.run((2.1, 1.1))
    assert len(machine.commands) == 1  # within the tolerance: once is enough


def test_the_tolerance_is_what_the_kept_runs_differ_by(machine: Machine) -> None:
    machine.run((2.0, 1.0), (2.5, 1.0), (2.4, 1.0), options="only=one runs=3")
    assert machine.kept().ratios["sides/1/ratio"] == [2.0, 2.5, 2.4]
    machine.run((1.95, 1.0))  # 19 % below 2.4, and they differ by 21 %
    with pytest.raises(SystemExit):
        machine.run((1.85, 1.0))
    with pytest.raises(SystemExit):
        machine.run((2.4, 1.12))  # these do not differ: 10 %


def test_a_better_figure_is_not_kept_by_itself(machine: Machine) -> None:
    machine.run((2.0, 1.0))
    machine.run((9.0, 0.5))
    assert machine.kept().ratios["memory"] == [1.0]


def test_keep_measures_three_times_and_replaces(machine: Machine) -> None:
    machine.run((2.0, 1.0))
    machine.run((1.0, 1.2), (1.1, 1.2), (1.2, 1.2), options="keep=true only=one")
    assert machine.kept().ratios == {"sides/1/ratio": [1.0, 1.1, 1.2], "memory": [1.2] * 3}


def test_full_settings_are_kept_apart(machine: Machine) -> None:
    machine.run((2.0, 1.0))
    machine.run((1.0, 9.0), options="full=true")
    assert machine.commands == ["scripts.benchmark_one n=9", "scripts.benchmark_one n=99"]
    assert machine.kept().ratios["memory"] == [1.0]
    assert machine.kept("full").ratios["memory"] == [9.0]


def test_figures_of_other_settings_are_not_compared(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.run((2.0, 1.0))
    plan = json.loads(json.dumps(PLAN).replace("n=1", "n=2"))
    (machine.folder / "plan.yaml").write_text(json.dumps(plan))
    machine.run((0.1, 9.0))
    assert "what is kept has other settings, and is not compared" in capsys.readouterr().err
    assert machine.kept().ratios["memory"] == [1.0]


def test_a_file_measured_before_is_taken_up(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"memory": 1.5}))
    main(["full=true", "only=large", f"found={path}"])
    assert machine.kept("full", "large").ratios == {"memory": [1.5]}
    assert machine.commands == []


def test_a_script_that_fails_does_not_stop_the_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_once(command: str) -> Any:
        if command.endswith("n=9"):
            raise ChildProcessError("exit code 3; its own words are above")
        return {"memory": 1.0}

    monkeypatch.setattr(run_benchmarks, "run_once", run_once)
    with pytest.raises(SystemExit):
        machine.run((0, 0), options="full=true")
    assert capsys.readouterr().err.endswith("one: exit code 3; its own words are above\n")
    assert machine.kept("full", "large").ratios == {"memory": [1.0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("only=two", "only=two is none of one, large, on_gpu"),
        ("found=x.json", "name it with only="),
        ("table=nowhere", "keeps no figures of the full settings; full=true makes some"),
        ("runs=0", "runs=0: "),
    ],
)
def test_bad_input_is_refused(machine: Machine, options: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        main(options.split())


def test_a_script_whose_json_has_no_such_figure_is_told(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    for text, fault in (("[1]", "no number at memory of the JSON"), ("{", "found.json is no JSON")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["full=true", "only=large", f"found={path}"])
        assert fault in capsys.readouterr().err.splitlines()[-1]
    assert not list(machine.folder.glob("acme*"))


def test_a_record_that_is_none_is_named(machine: Machine) -> None:
    machine.run((2.0, 1.0))
    path, record = machine.folder / "acme-r-9-core/small/one.json", machine.kept().model_dump()
    for content in ({}, record | {"machine": {"packages": {"torch": "2.11"}}}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"one\.json is no record of this script; delete it"):
            machine.run((2.0, 1.0))


def test_the_machine_has_a_name() -> None:
    assert cpu_name() and "\n" not in cpu_name()


def test_every_benchmark_is_in_the_plan() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("benchmark_*.py")}
    planned = {f"benchmark_{each.script}" for each in read_plan().values()}
    assert planned == scripts


def test_what_is_kept_was_made_with_the_settings_of_the_plan() -> None:
    plan = read_plan()
    for size in ("full", "small"):
        for path in (ROOT / "benchmarks").glob(f"*/{size}/*.json"):
            if "latest" in path.parts:
                continue
            record = read_record(path)
            assert record is not None and plan[path.stem].has_made(record), path
            assert record.command == plan[path.stem].command(full=size == "full"), path


def test_the_tables_of_the_pages_are_those_of_the_kept_figures() -> None:
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
    assert blocks
    for folder, table in blocks:
        assert table.strip() == kept_table(ROOT / "benchmarks" / folder, read_plan())
