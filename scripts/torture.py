"""Training runs are killed and damaged at random moments; each must end as if nothing had happened.

    python scripts/torture.py kills=50 output=torture.json     # another 50 each time it is started
    python scripts/torture.py only=17                          # that life alone, as it was drawn

A life is one tiny run: it is started, disturbed, started again with the same command, eight times,
and then left alone. Weights, averages, optimizer state and metrics are compared with those of a
run that nothing happened to, bit for bit. What happens is drawn from the seed; a process that is
to be hit at an event (the 17th file of a save, say) waits there, others are hit some milliseconds
later. Exit code 1: a life ended otherwise; its folder is kept.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.options import parse_options
from torture.damage import can_forbid_writing, can_mount
from torture.life import Report, live, train_twin
from torture.plan import Life, draw_life
from torture.results import Failure, read_results, write_results
from training.console import refuse

SHOWN_CHARACTERS = 600  # of a problem
# Killed runs leave semaphores, which the process that they were forked from removes, and says so.
QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"


class TortureOptions(BaseModel):
    """How much is tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kills: PositiveInt = Field(200, description="processes of runs that are killed, at least")
    seed: NonNegativeInt = Field(0, description="of all that is drawn")
    only: NonNegativeInt | None = Field(None, description="this life alone; nothing is written")
    output: Path | None = Field(
        None, description="JSON file of what came of it; more is added to what it holds"
    )
    folder: Path | None = Field(
        None, description="where lives are lived; null: a folder for temporary files"
    )


class Torture:
    """Lives one after another, and the twins that they share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._twin_s: dict[str, float] = {}

    def live(self, life: Life) -> Report:
        """One life; its folder is kept where it ended otherwise than its twin."""
        twin = self.folder / f"twin-{life.twin}"
        if life.twin not in self._twin_s:
            self._twin_s[life.twin] = train_twin(life, twin)
        place = self.folder / f"life-{life.number}"
        report = live(life, place, twin, self._twin_s[life.twin])
        if report.is_equal:
            shutil.rmtree(place)
        return report


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(TortureOptions, arguments, __doc__ or "")
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": QUIET}  # as all that is started here
    if not Path("/proc/self/stat").exists():
        raise ValueError(f"{platform.system()} does not tell in /proc what processes do; use Linux")
    results = read_results(options.output)
    for line in _choices():
        note(line)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=options.folder)).absolute()
    torture, is_equal = Torture(folder), True
    batch, started_at = results.begin(options.seed), time.monotonic()
    number = batch.lives[0] if options.only is None else options.only
    while batch.kills < options.kills:
        life = cut(draw_life(options.seed, number), options.kills - batch.kills)
        report = torture.live(life)
        results.add(report)
        batch.minutes = round((time.monotonic() - started_at) / 60, 1)
        note(f"{life}: {len(report.tried)} disturbances, {_verdict(report)}")
        if not report.is_equal:
            is_equal = False
            failure = failure_of(report, options, folder)
            note(*failure.problems, f"kept in {folder}", f"again: {failure.command}")
            results.failures.append(failure)
        if options.only is not None:
            break
        if options.output:
            write_results(results, options.output)
        number += 1
    if is_equal:
        shutil.rmtree(folder)
    print(*results.lines(), sep="\n")
    sys.exit(not is_equal)


def cut(life: Life, most_kills: int) -> Life:
    """The same, to its last kill that is wanted."""
    kept = []
    for each in life.disturbances:
        kept.append(each)
        if sum(what.is_kill for what in kept) == most_kills:
            break
    return replace(life, disturbances=tuple(kept))


def failure_of(report: Report, options: TortureOptions, folder: Path) -> Failure:
    """What is kept of a life that ended otherwise, without where it was lived."""
    life = report.life
    numbers = f"seed={options.seed} only={life.number} kills={max(1, life.kills)}"
    problems = [each.replace(f"{folder}/", "")[-SHOWN_CHARACTERS:] for each in report.problems]
    return Failure(command=f"python scripts/torture.py {numbers}", problems=problems)


def note(*lines: str) -> None:
    """Progress, on standard error."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _verdict(report: Report) -> str:
    return "ended as its twin" if report.is_equal else "ENDED OTHERWISE"


def _choices() -> list[str]:
    """What this machine does not allow, and what is done instead."""
    found = []
    if not can_mount():
        found.append("disk full: no small disk can be mounted here; the size of files is limited")
    if not can_forbid_writing():
        found.append("read-only: left out; root may write anywhere, and nothing can be mounted")
    return found


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        refuse(str(error))
