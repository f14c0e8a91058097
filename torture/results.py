"""What came of all lives so far: one file, which later batches add to, and a table of it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from torture.life import Report, Tried
from training.environment import project_commit

PACKAGES = ("torch", "numpy", "safetensors")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Record):
    """What came of one kind of disturbance of one kind of run."""

    kind: str
    net: str
    ranks: int
    tried: int = 0
    restarted: int = 0  # the same command went on
    equal: int = 0  # and the run ended as its twin
    codes: dict[str, int] = {}  # with which ranks ended; negative ones are signals


class Batch(_Record):
    """Lives that were tried in one go."""

    seed: int
    lives: tuple[int, int]  # the first, and the one after the last
    kills: int = 0
    disturbances: int = 0
    equal_lives: int = 0
    minutes: float = 0.0
    python: str
    packages: dict[str, str]
    platform: str
    device: str = "cpu"
    commit: str | None


class Failure(_Record):
    """A life that did not end as its twin."""

    command: str
    problems: list[str]


class Results(_Record):
    """Everything that was tried."""

    batches: list[Batch] = []
    rows: list[Row] = []
    failures: list[Failure] = []

    def next_life(self, seed: int) -> int:
        """The first that was not tried with this seed."""
        return max((batch.lives[1] for batch in self.batches if batch.seed == seed), default=0)

    def begin(self, seed: int) -> Batch:
        """A batch, with what it is computed with."""
        first = self.next_life(seed)
        batch = Batch(
            seed=seed,
            lives=(first, first),
            python=platform.python_version(),
            packages={name: metadata.version(name) for name in PACKAGES},
            platform=f"{platform.system()} {platform.machine()}",
            commit=project_commit(),
        )
        self.batches.append(batch)
        return batch

    def add(self, report: Report) -> None:
        """One life more, of the last batch."""
        batch = self.batches[-1]
        batch.lives = (batch.lives[0], report.life.number + 1)
        batch.equal_lives += report.is_equal
        for each in report.tried:
            batch.kills += each.what.is_kill
            batch.disturbances += 1
            self._count(report, each)

    def _count(self, report: Report, each: Tried) -> None:
        life = report.life
        key = (each.what.name, life.net, life.ranks)
        found = [row for row in self.rows if (row.kind, row.net, row.ranks) == key]
        row = found[0] if found else Row(kind=key[0], net=key[1], ranks=key[2])
        if not found:
            self.rows = sorted([*self.rows, row], key=lambda row: (row.kind, row.net, row.ranks))
        row.tried += 1
        row.restarted += each.has_restarted
        row.equal += report.is_equal
        row.codes = dict(Counter(row.codes) + Counter(map(str, each.codes)))

    def lines(self) -> list[str]:
        """The table: a row for each kind, a column for each net and number of ranks."""
        nets = sorted({(row.ranks, row.net) for row in self.rows})
        heads = [f"{net} x{ranks}" for ranks, net in nets]
        kinds = sorted({row.kind for row in self.rows})
        width = max(map(len, ["all", *kinds]), default=0)
        lines = ["tried / went on / ended as its twin", " ".join([" " * width, *heads, "all"])]
        for kind in [*kinds, "all"]:
            rows = [row for row in self.rows if kind in (row.kind, "all")]
            cells = [_cell([row for row in rows if (row.ranks, row.net) == net]) for net in nets]
            padded = [cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)]
            lines.append(" ".join([kind.ljust(width), *padded, _cell(rows)]))
        return lines


def read_results(path: Path | None) -> Results:
    """What the file holds; nothing where there is none yet."""
    if path is None or not path.exists():
        return Results()
    try:
        return Results.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(
            f"output={path} cannot be added to: {told}; give another file, or remove it"
        ) from None


def write_results(results: Results, path: Path) -> None:
    """The whole of it, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(results.model_dump(), indent=1) + "\n")
    aside.replace(path)


def _cell(rows: list[Row]) -> str:
    counts = [sum(getattr(row, name) for row in rows) for name in ("tried", "restarted", "equal")]
    return "/".join(map(str, counts)) if counts[0] else "-"
