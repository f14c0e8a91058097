"""Runs the benchmarks, and holds the ratio that each finds against the one kept for this device.

    python -m scripts.run_benchmarks                       # small settings, some minutes
    python -m scripts.run_benchmarks full=true keep=true   # the settings of README's table
    python -m scripts.run_benchmarks table=amd-epyc        # that table, from what is kept

Each script of benchmarks/plan.yaml measures its sides in one run; their ratio is held and kept,
never a time. One that looks worse is measured twice more, and the median counts: worse by more than
the tolerance is exit code 1. The tolerance: what the runs of the kept figure differ by, at least
10 %; 20 % where it has fewer than three. Figures go to benchmarks/<device>/latest, kept ones to
full and small beside it: the first ones at once, others with keep=true alone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from data_io.console import note, run_command
from data_io.options import parse_options
from training.publishing import write_atomically

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks"
TOLERANCE, FEW_RUNS_TOLERANCE, ENOUGH_RUNS = 0.1, 0.2, 3
SHOWN = {"high": "x", "low": " (low is good)", "one": " (1 is right)"}
PACKAGES = ("torch", "numpy", "numba", "tokenizers", "transformers")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Strict):
    """A ratio in the JSON of a script."""

    place: str  # its keys, joined by "/"
    what: str
    against: str
    best: Literal["high", "low", "one"] = "high"

    def read(self, found: Any) -> float:
        try:
            for key in self.place.split("/"):
                found = found[int(key) if isinstance(found, list) else key]
            return float(found)
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"no number at {self.place} of the JSON; see plan.yaml") from None

    def gain(self, ratio: float, kept: float) -> float:
        """How much better it is than the kept one: 0.1 is a tenth."""
        scores = {"high": ratio / kept, "low": kept / ratio}
        scores["one"] = min(ratio, 1 / ratio) / min(kept, 1 / kept)
        return scores[self.best] - 1


class Benchmark(Strict):
    """A script and its settings."""

    script: str
    full: str
    small: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    figures: tuple[Figure, ...]

    def command(self, *, full: bool) -> str:
        return f"scripts.benchmark_{self.script} {self.full if full else self.small}"

    def has_made(self, record: Record) -> bool:
        is_known = record.command in (self.command(full=True), self.command(full=False))
        return is_known and list(record.ratios) == [figure.place for figure in self.figures]


class Record(Strict):
    """What the runs of a benchmark found."""

    command: str  # a module and its arguments
    machine: dict[str, str | int]
    ratios: dict[str, list[float]]  # of each run, by the place of the figure
    found: Any  # all that the last run wrote

    def ratio(self, figure: Figure) -> float:
        return median(self.ratios[figure.place])

    def tolerance(self, figure: Figure) -> float:
        """The share by which a later figure may be worse than this one."""
        runs = self.ratios[figure.place]
        if len(runs) < ENOUGH_RUNS:
            return FEW_RUNS_TOLERANCE
        return max(TOLERANCE, (max(runs) - min(runs)) / median(runs))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.model_dump(), indent=2) + "\n")


class Options(Strict):
    """What is run, and what becomes of what it finds."""

    full: bool = Field(False, description="the settings of README's table: an hour, not minutes")
    only: list[str] = Field([], description="names in benchmarks/plan.yaml; empty: all")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="whose benchmarks; auto: the CPU's, and CUDA's where torch finds a GPU"
    )
    runs: PositiveInt | None = Field(
        None, description="of each; null: 1, and 3 to keep it or where it looks worse"
    )
    keep: bool = Field(False, description="replaces what is kept, also by what is worse")
    found: Path | None = Field(
        None, description="JSON of the one benchmark in only=, measured here before: not run again"
    )
    table: str | None = Field(None, description="prints the table of this folder of benchmarks/")


def read_plan() -> dict[str, Benchmark]:
    plan = yaml.safe_load((KEPT / "plan.yaml").read_text(encoding="utf-8"))
    return {name: Benchmark.model_validate(fields) for name, fields in plan.items()}


def read_record(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError:
        raise ValueError(f"{path} is no record of this script; delete it") from None


def describe(device: str) -> dict[str, Any]:
    """What the figures belong to; never the name of a host."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    own = {"device": name, "cores": os.cpu_count(), "python": platform.python_version()}
    return own | {package: metadata.version(package) for package in PACKAGES}


def cpu_name() -> str:
    listed = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", listed.read_text() if listed.is_file() else "")
    return named[1].strip() if named else platform.processor() or platform.machine()


def folder_of(device: str) -> Path:
    return KEPT / re.sub(r"[^a-z0-9]+", "-", describe(device)["device"].lower()).strip("-")


def chosen(plan: dict[str, Benchmark], options: Options) -> Iterator[tuple[str, Benchmark]]:
    """What is to be run here; what is left out is said."""
    if unknown := sorted(set(options.only) - set(plan)):
        raise ValueError(f"only={unknown[0]} is none of {', '.join(plan)}")
    if options.found is not None and len(options.only) != 1:
        raise ValueError("found=... belongs to one benchmark; name it with only=...")
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    devices &= devices if options.device == "auto" else {options.device}
    for name, benchmark in plan.items():
        if options.only and name not in options.only:
            continue
        if benchmark.device not in devices:
            note(f"{name}: left out, it needs {benchmark.device} (device={options.device})")
        elif not options.full and benchmark.small is None:
            note(f"{name}: left out, it has no small settings (full=true)")
        else:
            yield name, benchmark


def run_once(command: str) -> Any:
    """The JSON that a script writes; it has one thread, and prints to standard error."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        output = Path(folder) / "found.json"
        words = (word.format(json=output) for word in shlex.split(command))
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        call = [sys.executable, "-m", *words]
        done = subprocess.run(call, cwd=ROOT, env=environment, stdout=sys.stderr)
        if done.returncode or not output.is_file():
            raise ChildProcessError(f"exit code {done.returncode}; its own words are above")
        return read_json(output)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); name what the script wrote") from None


def measure(name: str, benchmark: Benchmark, options: Options, kept: Record | None) -> Record:
    """As many runs as it takes to tell."""
    command, machine = benchmark.command(full=options.full), describe(benchmark.device)
    ratios = {figure.place: [] for figure in benchmark.figures}
    record = Record(command=command, machine=machine, ratios=ratios, found=None)
    is_asked = options.runs or options.keep or options.found
    number, runs = 0, 1 if options.found else options.runs or (ENOUGH_RUNS if options.keep else 1)
    while number < runs:
        number += 1
        note(f"== {name}, run {number} of {runs}")
        found = read_json(options.found) if options.found else run_once(record.command)
        for figure in benchmark.figures:
            record.ratios[figure.place].append(figure.read(found))
        if kept and number == 1 and not is_asked and faults_of(name, benchmark, record, kept):
            note(f"{name}: looks worse than what is kept; measured twice more")
            runs = ENOUGH_RUNS
        record = record.model_copy(update={"found": found})
    return record


def faults_of(name: str, benchmark: Benchmark, record: Record, kept: Record) -> list[str]:
    """The figures that are worse than the kept ones by more than the tolerance, in words."""
    faults = []
    for figure in benchmark.figures:
        gain, limit = figure.gain(record.ratio(figure), kept.ratio(figure)), kept.tolerance(figure)
        if gain < -limit:
            faults.append(f"{name}: {figure.what}: worse by {-gain:.0%} (tolerance {limit:.0%})")
    return faults


def rows_of(benchmark: Benchmark, record: Record, kept: Record | None) -> Iterator[str]:
    """A line of the table of this run for each figure."""
    for figure in benchmark.figures:
        ratio, before, change = record.ratio(figure), "none", ""
        if kept is not None:
            gain = figure.gain(ratio, kept.ratio(figure))
            before = show(figure, kept.ratio(figure))
            change = f"{'better' if gain >= 0 else 'worse'} by {abs(gain):.0%}"
        words = (figure.what, figure.against, show(figure, ratio), before, change)
        yield f"| {' | '.join(words)} |"


def show(figure: Figure, ratio: float) -> str:
    return f"{ratio:.2f}{SHOWN[figure.best]}"


def kept_table(folder: Path, plan: dict[str, Benchmark]) -> str:
    """README's table: what is kept of the full settings in a folder of benchmarks/."""
    places = {name: folder / "full" / f"{name}.json" for name in plan}
    records = {name: found for name, place in places.items() if (found := read_record(place))}
    if not records:
        raise ValueError(f"{folder} keeps no figures of the full settings; full=true makes some")
    lines = []
    for name, record in records.items():
        machine = f"{record.machine['device']}, torch {record.machine['torch']}"
        for figure in plan[name].figures:
            runs = record.ratios[figure.place]
            spread = f"{min(runs):.2f} to {max(runs):.2f}" if len(runs) > 1 else "one run"
            words = (figure.what, figure.against, show(figure, record.ratio(figure)), spread)
            lines.append(f"| {' | '.join(words)} | {machine} |")
    head = ["| benchmark | ours against | ratio | runs | device |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines])


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(Options, arguments, __doc__ or "")
    plan = read_plan()
    if options.table is not None:
        print(kept_table(KEPT / options.table, plan))
        return
    rows, faults, size = [], [], "full" if options.full else "small"
    for name, benchmark in chosen(plan, options):
        folder, file = folder_of(benchmark.device), f"{size}/{name}.json"
        place, kept = folder / file, read_record(folder / file)
        if kept and not benchmark.has_made(kept):
            note(f"{name}: what is kept has other settings, and is not compared: {kept.command}")
            kept = None
        try:
            record = measure(name, benchmark, options, kept)
        except (ChildProcessError, ValueError) as error:
            faults.append(f"{name}: {error}")
            continue
        if kept and (other := dict(kept.machine.items() - record.machine.items())):
            note(f"{name}: what is kept was measured with other versions: {other}")
        record.write(folder / "latest" / file)
        if options.keep or not place.exists():
            record.write(place)
            note(f"{name}: kept in {place.relative_to(KEPT.parent)}")
        rows += rows_of(benchmark, record, kept)
        if kept and not options.keep:
            faults += faults_of(name, benchmark, record, kept)
    head = ("| benchmark | ours against | ratio | kept | change |", "|---|---|---|---|---|")
    print(*head, *rows, sep="\n", flush=True)
    if faults:
        note(*faults)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
