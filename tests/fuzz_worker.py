"""Tries readers on mutated files, each turn in a forked process that may crash or be killed.

    python tests/fuzz_worker.py '{"readers": ["export"], "seconds": 60, "seed": 0, ...}' HOME

Writes a line of JSON for each fault and at the end of each turn; `kept` names a file in HOME that
is there until the line after it. `--list` names the readers.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

from fuzz_cases import FaultError, Fuzzed  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mutation_cases import mutated  # noqa: E402
from reader_cases import READERS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 2**30  # of memory, beside what the process has to begin with
PER_ROUND = 200
HANG_S = 60.0  # with one example, or with making the valid folder
FIRST_TURN_S = 4.0
Line = dict[str, Any]


def rotate(names: list[str], first_seed: int, seconds: float, turn_s: float, home: Path) -> None:
    """Turns until the time is over; the first ones are short, so that every reader has one."""
    deadline, number = time.monotonic() + seconds, first_seed
    while time.monotonic() < deadline:
        for name in names:
            most_s = turn_s if number > first_seed else min(turn_s, FIRST_TURN_S)
            left_s = min(most_s, deadline - time.monotonic())
            if left_s <= 0:
                return
            for line in take_turn(name, number, left_s, home):
                print(json.dumps({"reader": name, "seed": number, **line}), flush=True)
        number += 1


def take_turn(name: str, number: int, seconds: float, home: Path) -> Iterator[Line]:
    """What a forked process tells; one that crashes or hangs leaves what it was reading."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    process = os.fork()
    if not process:
        code = 1
        try:
            sys.stdout = (home / "said").open("w")  # readers may print
            with (home / "lines").open("w") as lines:
                for line in fuzz(name, number, seconds, home):
                    print(json.dumps(line), file=lines, flush=True)
            code = 0
        finally:
            os._exit(code)
    what = end_of(process, home / "now")
    yield from map(json.loads, (home / "lines").read_text().splitlines())
    if what:
        now = home / "now"
        file = (home / "now.name").read_text() if now.is_file() else "no file yet"
        yield {"fault": what, "where": "?", "file": file, "kept": str(now)}


def end_of(process: int, now: Path) -> str | None:
    """Waits; how it ended, None: well. `now` is written before each example."""
    begun_at = time.time()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended and os.WIFSIGNALED(status):
            return f"crash ({signal.Signals(os.WTERMSIG(status)).name})"
        if ended:
            return f"ended with {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else None
        moved_at = now.stat().st_mtime if now.is_file() else begun_at
        if time.time() - moved_at > HANG_S:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"hang of more than {HANG_S:.0f} s"
        time.sleep(0.05)


def fuzz(name: str, number: int, seconds: float, home: Path) -> Iterator[Line]:
    """Each fault, then the counts; for some seconds of CPU time, its preparation left out."""
    fuzzed = Fuzzed(name, READERS[name], home)
    limit_memory()
    deadline, num_faults, number = time.process_time() + seconds, 0, number * 1_000_000
    while time.process_time() < deadline:
        number += 1
        for fault in one_round(fuzzed, number, deadline):
            num_faults += 1
            kept = home / f"fault.{num_faults}"
            kept.write_bytes(fault.pop("content"))
            yield {**fault, "kept": str(kept)}
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    examples = sum(fuzzed.told.values()) + num_faults
    yield {"examples": examples, **fuzzed.told, "peak_mb": peak_mb}


def limit_memory() -> None:
    """An allocation beyond is a MemoryError, which is a fault."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def one_round(fuzzed: Fuzzed, number: int, deadline: float) -> list[Line]:
    """What went wrong with the examples of one seed."""
    faults = []

    def try_one(file: str, content: bytes) -> None:
        if time.process_time() > deadline:
            return
        (fuzzed.home / "now.name").write_text(file)
        (fuzzed.home / "now").write_bytes(content)
        try:
            fuzzed.try_file(file, content)
        except FaultError as fault:
            told = {"fault": str(fault), "where": place_of(fault), "file": file}
            faults.append({**told, "content": content})

    try_examples(fuzzed, try_one, number=number, count=PER_ROUND)
    return faults


def try_examples(
    fuzzed: Fuzzed, try_one: Callable[[str, bytes], None], *, number: int, count: int
) -> None:
    """Calls `try_one` with at most `count` files and mutated contents, those of one seed."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(fuzzed.contents)))
        try_one(file, data.draw(mutated(fuzzed.contents[file], fuzzed.reader.files[file])))

    draw()


def place_of(fault: FaultError) -> str:
    """Where our code was when it went wrong."""
    error, found = fault.__cause__ or fault, "?"
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        path = Path(code.co_filename)
        is_ours = path.is_relative_to(ROOT) and ".venv" not in path.parts
        if is_ours and "tests" not in path.parts:
            found = f"{path.relative_to(ROOT)}:{traceback.tb_lineno} {code.co_name}"
        traceback = traceback.tb_next
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["--list"]:
        print(json.dumps(list(READERS)))
        sys.exit()
    asked, place = json.loads(sys.argv[1]), Path(sys.argv[2])
    rotate(asked["readers"], asked["seed"], asked["seconds"], asked["turn"], place)
