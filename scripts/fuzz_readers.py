"""Fuzzes every reader of files that others may have written, in rotation.

    python scripts/fuzz_readers.py minutes=10 seed=0
    python scripts/fuzz_readers.py readers=export,tensors minutes=1 kept=DIR

Valid files, mutations and readers are those of tests/ (reader_cases.py, mutation_cases.py); needs
requirements-dev.txt. Each turn runs in a process of its own, with 1 GiB of memory beyond what it
begins with. A fault is an error that no entry point turns into one line, a crash, a hang, a write
outside the folder. What caused it is kept as a file, with its seed. Exit code 1: there are faults.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.console import note, run_command
from data_io.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "fuzz_worker.py"
COUNTED = ("examples", "accepted", "refused")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    minutes: PositiveFloat = Field(10.0, description="for all readers together")
    seed: NonNegativeInt = Field(0, description="of the first turn; later ones count up")
    readers: tuple[str, ...] = Field((), description="these alone (default: all of them)")
    turn: PositiveFloat = Field(20.0, description="CPU seconds of a reader's turn")
    kept: Path = Field(Path("fuzz_faults"), description="folder for what caused faults")
    output: Path | None = Field(None, description="counts as JSON (null: none)")


@dataclass
class Told:
    """What became of one reader's examples; faults by place and kind, with the first file."""

    counts: Counter[str] = field(default_factory=Counter)
    peak_mb: int = 0
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, line: dict[str, Any], kept: Path) -> None:
        """A line of a worker; of each kind of fault, one file is kept."""
        if "fault" not in line:
            self.peak_mb = max(self.peak_mb, line["peak_mb"])
            self.counts.update({key: line[key] for key in COUNTED})
            return
        kind = f"{line['where']}: {line['fault']:.60}"
        if kind not in self.faults:
            kept.mkdir(parents=True, exist_ok=True)
            name = f"{line['file'].replace('/', '__')}.{len(list(kept.iterdir()))}"
            if Path(line["kept"]).is_file():
                shutil.copyfile(line["kept"], kept / name)
            self.faults[kind] = {**line, "kept": str(kept / name), "times": 0}
        self.faults[kind]["times"] += 1


def run_worker(*arguments: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a worker as they come; ValueError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "errors").open("w+b") as errors:
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=folder,
            text=True,
        )
        assert worker.stdout is not None
        try:
            yield from map(json.loads, worker.stdout)
        finally:
            if sys.exc_info()[0]:
                worker.kill()
            worker.wait()
        if worker.returncode:
            errors.seek(0)
            raise ValueError(f"{WORKER} failed: {errors.read()[-500:].decode(errors='replace')}")


def fuzz(settings: Settings, folder: Path) -> dict[str, Told]:
    """Counts and faults by reader."""
    (known,) = run_worker("--list", folder=folder)
    unknown = [name for name in settings.readers if name not in known]
    if unknown:
        raise ValueError(f"readers={unknown[0]} is none of {', '.join(known)}")
    told = {name: Told() for name in settings.readers or known}
    asked = {"readers": list(told), "seed": settings.seed, "turn": settings.turn}
    order = json.dumps({**asked, "seconds": 60 * settings.minutes})
    for line in run_worker(order, str(folder / "home"), folder=folder):
        name = line.pop("reader")
        told[name].add(line, settings.kept)
        if "examples" in line:
            found = told[name]
            note(f"{name}: {found.counts['examples']:,} examples, {len(found.faults)} faults")
    return told


def main(arguments: list[str]) -> None:
    settings = parse_options(Settings, arguments, __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        told = fuzz(settings, Path(folder))
    print(f"{'reader':20}{'examples':>10}{'accepted':>10}{'refused':>10}{'faults':>8}{'MB':>7}")
    for name, found in told.items():
        examples, accepted, refused = (found.counts[key] for key in COUNTED)
        faults = sum(each["times"] for each in found.faults.values())
        print(f"{name:20}{examples:>10,}{accepted:>10,}{refused:>10,}{faults:>8}{found.peak_mb:>7}")
    faults = [(name, each) for name, found in told.items() for each in found.faults.values()]
    for name, each in faults:
        print(f"FAULT  {name}: {each['fault']} ({each['where']}, {each['times']} times)")
        print(f"       seed {each['seed']}, kept as {each['kept']}")
    if settings.output is not None:
        record = {
            "settings": settings.model_dump(mode="json", include={"minutes", "seed", "turn"}),
            "readers": {
                name: {
                    **{key: found.counts[key] for key in COUNTED},
                    "peak_mb": found.peak_mb,
                    "kinds": list(found.faults),
                }
                for name, found in told.items()
            },
        }
        settings.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
