"""Long-run hygiene: tiny steps by the thousand, watched from outside, and killed in between.

    python scripts/check_long_run.py steps=20000 output=benchmarks/long_run.json

Two real runs of pretrain.py (Linux: /proc tells of them). The first goes through without a stop:
its memory, open files, threads and processes must stay as they are after the warm-up. The second
has the same settings, is killed with SIGKILL at random moments and continued: metrics.jsonl must be
whole all along, and in the end say what the first run's says. Exit code 1: something grows, or
differs. Longer than 300 lines: two runs, and all that is looked at in them.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.console import note, run_command
from data_io.options import parse_options
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE, MAX_SEQ_LEN, BATCH_TOKENS = 287, 33, 64  # 287: of the byte tokenizer
LOG_INTERVAL = 10  # steps
EPOCHS, EXAMPLES_PER_STEP = 10, 5  # of the latter more than fit: no run is out of steps
TINY = (
    *("arch/size@arch=nano", "arch.n_layers=2", "arch.hidden_size=16", "arch.num_heads=2"),
    *("arch.intermediate_size=24", f"global_batch_size={BATCH_TOKENS}", "lr=1e-2", "device=cpu"),
    *("lr_warmup_steps=1", "linear=mkl", "tracker=none", f"log_interval={LOG_INTERVAL}"),
    *("val_data.num_samples=2", "val_data.max_new_tokens=8", "val_data.keep_best=true"),
    "keep_last=3",
)
FLAT = ("handles", "threads", "processes")


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: PositiveInt = Field(
        default=20_000, ge=400, description="of the run that nothing happens to"
    )
    kills: NonNegativeInt = Field(default=8, description="SIGKILLs of the other run")
    killed_steps: PositiveInt | None = Field(
        default=None, description="of the run that is killed (null: a quarter of steps)"
    )
    look_every: PositiveFloat = Field(
        default=0.25, description="seconds between looks at the process"
    )
    most_mb: PositiveFloat = Field(default=1.0, description="of memory that 1,000 steps may add")
    seed: int = Field(default=0, description="of the data and the moments of the kills")
    work: Path | None = Field(
        default=None, description="where runs are made (null: a temporary folder)"
    )
    output: Path | None = Field(default=None, description="figures as JSON (null: none)")

    @property
    def steps_of_killed(self) -> int:
        return self.killed_steps or self.steps // 4

    @property
    def warmup_steps(self) -> int:
        return self.steps // 5


@dataclass(frozen=True, slots=True)
class Look:
    """What /proc says of a trainer at one moment; memory without what other processes share."""

    step: int
    rss_kb: int  # of the trainer
    workers_kb: int  # of its processes together
    handles: int
    threads: int
    processes: int  # below it


class Trainer:
    """pretrain.py in a process of its own."""

    def __init__(self, folder: Path, settings: Settings, steps: int) -> None:
        self.folder = folder
        self.run = folder / "run"
        interval = max(50, settings.steps // 40)
        self.command = [
            *(sys.executable, str(ROOT / "pretrain.py"), *TINY, "checkpoint_path=run"),
            *(f"data.path={folder / 'data'}", f"val_data.path={folder / 'held_out'}"),
            *(f"val_data.interval={interval}", f"checkpoint_steps={interval}"),
            *(f"epochs={EPOCHS}", f"max_steps={steps}", f"seed={settings.seed}"),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "said.txt").open("ab") as said:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdout=said, stderr=said, env=environment
            )

    def is_running(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def require_done(self) -> None:
        assert self.process is not None
        if self.process.returncode:
            told = (self.folder / "said.txt").read_text(errors="replace").strip()
            raise ValueError(
                f"pretrain.py ended with exit code {self.process.returncode}: {told[-400:]}"
            )

    def look(self) -> Look | None:
        """None where it has just ended, or has not begun to train."""
        assert self.process is not None
        try:
            below = processes_below(self.process.pid)
            own = Path(f"/proc/{self.process.pid}")
            look = Look(
                step=last_step(self.run / "metrics.jsonl"),
                rss_kb=status_kb(own),
                workers_kb=sum(status_kb(Path(f"/proc/{pid}")) for pid in below),
                handles=len(list((own / "fd").iterdir())),
                threads=len(list((own / "task").iterdir())),
                processes=len(below),
            )
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
        return look if look.rss_kb else None


def processes_below(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *processes_below(child)]
    return found


def status_kb(process: Path) -> int:
    """VmRSS of a process; 0 for one that is gone but not yet collected."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0


def last_step(metrics: Path) -> int:
    """Of the last whole line."""
    with metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    return int(json.loads(whole)["step"]) if whole else 0


def make_data(folder: Path, settings: Settings) -> None:
    """Sampled data of random bytes, and a little more that is held out."""
    longest = max(settings.steps, settings.steps_of_killed)
    for name, examples, epochs in (
        ("data", EXAMPLES_PER_STEP * longest // EPOCHS + 100, EPOCHS),
        ("held_out", 20, 1),
    ):
        draw = np.random.default_rng(settings.seed)
        info = TokenizerInfo(
            tokenizer_path=str(folder / name),
            boq=BOQ,
            eoq=EOQ,
            eoa=EOA,
            condition_mapping=dict(CONDITION_TOKENS),
            vocab_size=VOCAB_SIZE,
        )
        with SampledWriter(folder / name, info, max_seq_len=MAX_SEQ_LEN) as writer:
            write_byte_tokenizer(writer.staging)
            writer.add_tokens(draw.integers(0, VOCAB_SIZE, 4000))
            for _ in range(epochs):
                starts = draw.integers(0, 3980, (2, examples))
                lens = draw.integers(1, 16, (2, examples))
                writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))


def watch(trainer: Trainer, settings: Settings) -> list[Look]:
    """Looks at a run until its end."""
    looks, told_at = [], time.monotonic()
    trainer.start()
    while trainer.is_running():
        look = trainer.look()
        if look is not None and look.step:
            looks.append(look)
        if looks and time.monotonic() - told_at > 30:
            told_at = time.monotonic()
            note(f"step {looks[-1].step:,}: {looks[-1].rss_kb / 1024:.1f} MB")
        time.sleep(settings.look_every)
    trainer.require_done()
    return looks


def kill_and_continue(trainer: Trainer, settings: Settings) -> list[int]:
    """The steps at which it was killed; ValueError where metrics.jsonl is damaged then."""
    draw = np.random.default_rng(settings.seed + 1)
    last = settings.steps_of_killed
    wanted = sorted(int(step) for step in draw.integers(20, max(21, last - 20), settings.kills))
    killed = []
    for step in wanted:
        trainer.start()
        while trainer.is_running():
            look = trainer.look()
            if look is not None and look.step >= step:
                time.sleep(float(draw.uniform(0, 0.05)))
                break
            time.sleep(0.002)
        if not trainer.is_running():
            trainer.require_done()
            break  # it was over before
        trainer.kill()
        killed.append(last_step(trainer.run / "metrics.jsonl"))
        require_whole(lines_of(trainer.run / "metrics.jsonl", may_be_torn=True))
        note(f"killed at step {killed[-1]:,}")
    trainer.start()
    while trainer.is_running():
        time.sleep(settings.look_every)
    trainer.require_done()
    return killed


def lines_of(path: Path, *, may_be_torn: bool = False) -> list[dict[str, Any]]:
    """Every line, parsed; the last one may be torn just after a kill, and at no other time."""
    texts = path.read_bytes().split(b"\n")
    tail = texts.pop()
    if tail and not may_be_torn:
        raise ValueError(f"{path} ends in a torn line: {tail[:60]!r}")
    return [json.loads(text) for text in texts]


def require_whole(lines: Sequence[dict[str, Any]]) -> None:
    """Steps with a loss rise by log_interval from line to line: none twice, none left out."""
    steps = [line["step"] for line in lines if "train/loss" in line]
    for number, step in enumerate(steps[:-1], start=1):  # the last one may be that of the last step
        if step != LOG_INTERVAL * number:
            raise ValueError(
                f"metrics.jsonl has step {step} where {LOG_INTERVAL * number} should be"
            )


def slope(steps: Sequence[int], values: Sequence[float], most: int = 1500) -> float:
    """Change per 1,000 steps: the median over all pairs (Theil and Sen), so that spikes and
    single jumps count little."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).astype(int))
    x, y = np.asarray(steps, float)[chosen], np.asarray(values, float)[chosen]
    first, second = np.triu_indices(len(x), 1)
    is_later = x[second] > x[first]
    rises = (y[second] - y[first])[is_later] / (x[second] - x[first])[is_later]
    return 1000 * float(np.median(rises)) if len(rises) else 0.0


def figures_of(looks: Sequence[Look], settings: Settings) -> dict[str, Any]:
    """What became of a run after its warm-up."""
    warm = [look for look in looks if look.step >= settings.warmup_steps]
    if len(warm) < 20:
        raise ValueError(f"only {len(warm)} looks after the warm-up; give more steps=")
    steps = [look.step for look in warm]
    half = len(warm) // 2
    found: dict[str, Any] = {
        "looks": len(warm),
        "steps": [steps[0], steps[-1]],
        "trainer_mb_per_1000_steps": slope(steps, [look.rss_kb / 1024 for look in warm]),
        "workers_mb_per_1000_steps": slope(steps, [look.workers_kb / 1024 for look in warm]),
        "trainer_mb": [warm[0].rss_kb / 1024, warm[-1].rss_kb / 1024],
    }
    for kind in FLAT:  # the most of each half: between epochs a worker more may be there
        values = [getattr(look, kind) for look in warm]
        found[kind] = {"first_half": max(values[:half]), "second_half": max(values[half:])}
    return found


def faults_of(found: dict[str, Any], settings: Settings) -> list[str]:
    """What is not as promised."""
    faults = [
        f"{key}={found[key]:.3f} is not below {settings.most_mb}"
        for key in ("trainer_mb_per_1000_steps", "workers_mb_per_1000_steps")
        if found[key] >= settings.most_mb
    ]
    return faults + [
        f"{kind} grow from {found[kind]['first_half']} to {found[kind]['second_half']}"
        for kind in FLAT
        if found[kind]["second_half"] > found[kind]["first_half"]
    ]


def same_metrics(one: Path, other: Path, last: int) -> bool:
    """Whether two runs wrote the same lines up to a step, speeds aside; with those of a stop."""
    ours, theirs = (
        [
            {name: value for name, value in line.items() if name != "tokens_per_second"}
            for line in lines_of(path)
            if line["step"] < last
        ]
        for path in (one, other)
    )
    return bool(ours) and ours == theirs


def check(settings: Settings, folder: Path) -> tuple[dict[str, Any], list[str]]:
    make_data(folder, settings)
    whole, killed = (
        _trainer(folder, name, settings, steps)
        for name, steps in (("whole", settings.steps), ("killed", settings.steps_of_killed))
    )
    started_at = time.monotonic()
    looks = watch(whole, settings)
    elapsed_s = time.monotonic() - started_at
    require_whole(lines_of(whole.run / "metrics.jsonl"))
    found = figures_of(looks, settings)
    found["seconds"], found["ms_per_step"] = elapsed_s, 1000 * elapsed_s / settings.steps
    faults = faults_of(found, settings)
    kills = kill_and_continue(killed, settings)
    one, other = (trainer.run / "metrics.jsonl" for trainer in (whole, killed))
    require_whole(lines_of(other))
    last = min(settings.steps, settings.steps_of_killed)
    found["killed_at"], found["same_metrics"] = kills, same_metrics(one, other, last)
    if not found["same_metrics"]:
        faults.append("the run that was killed says something else in metrics.jsonl")
    return found, faults


def _trainer(folder: Path, name: str, settings: Settings, steps: int) -> Trainer:
    place = folder / name
    place.mkdir()
    for data in ("data", "held_out"):
        (place / data).symlink_to(folder / data)
    return Trainer(place, settings, steps)


def main(arguments: list[str]) -> None:
    settings = parse_options(Settings, arguments, __doc__ or "")
    if not Path("/proc/self/fd").is_dir():
        raise ValueError("this looks at runs through /proc, which is not here; use Linux")
    with tempfile.TemporaryDirectory(dir=settings.work, prefix="long-run-") as folder:
        found, faults = check(settings, Path(folder))
    print(json.dumps(found, indent=2))
    if settings.output is not None:
        record = {
            "settings": settings.model_dump(mode="json", exclude={"work", "output"}),
            "machine": {"system": platform.system(), "cores": os.cpu_count()},
            **found,
            "faults": faults,
        }
        settings.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(*(f"FAIL  {fault}" for fault in faults), sep="\n", end="\n" * bool(faults))
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
