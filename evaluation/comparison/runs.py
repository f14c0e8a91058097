"""Trains one run in a process of its own, and scores its checkpoints; what is done stays done.

<output>/runs/<name>/       the run directory of pretrain.py
<output>/runs/<name>.json   CPU and wall seconds, and which items each checkpoint answers right
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_io.sampled_format import SampledData
from evaluation.comparison.plan import Planned, Settings, run_name
from evaluation.procedural_tasks import Part
from evaluation.reasoning_tasks import score
from simple_inference_engine import ModelOptions, load_model
from training.checkpoint import read_checkpoint
from training.environment import recorded_choices
from training.publishing import write_atomically
from training.run_records import fingerprint_of

Row = Mapping[str, Any]
PRETRAIN = Path(__file__).resolve().parents[2] / "pretrain.py"
POINTS = 3  # checkpoints scored in each run, the last one included


class StoppedError(Exception):
    """Not everything is done: time is up, or a signal came. The same command goes on."""


class RunFailedError(Exception):
    """pretrain.py ended with an error."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where runs lie, what they are scored on, and when to stop."""

    output: Path
    recipe: str
    data: SampledData
    items: Mapping[Part, Sequence[Row]]  # what each part asks, as in its JSONL file
    device: str
    stop_at: float  # of time.monotonic()

    def run(self, planned: Planned, lr: float, seed: int) -> TrainedRun:
        """The run, trained to its end now or before."""
        run = TrainedRun(self, planned, lr, seed)
        if not run.is_trained:
            self.require_time()
            print(f"training {run.path.name}, {planned.steps:,} steps", flush=True)
            run.train()
        require_same_data(run.choices().get("data"), self.data, run.path)
        return run

    def require_time(self) -> None:
        if time.monotonic() >= self.stop_at:
            raise StoppedError("max_minutes is over")


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """One run: a net, a learning rate, a seed."""

    bench: Bench
    planned: Planned
    lr: float
    seed: int

    @property
    def path(self) -> Path:
        return self.bench.output / "runs" / run_name(self.planned, self.lr, self.seed)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of it so far."""
        path = self.path.with_name(f"{self.path.name}.json")
        if not path.is_file():
            return {"cpu_seconds": 0.0, "wall_seconds": 0.0, "scores": {}}
        return json.loads(path.read_text())

    def keep(self, record: dict[str, Any]) -> None:
        path = self.path.with_name(f"{self.path.name}.json")
        write_atomically(path, json.dumps(record, indent=1) + "\n")

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoints are scored."""
        every = -(-self.planned.steps // POINTS)
        return [*range(every, self.planned.steps, every), self.planned.steps]

    @property
    def is_trained(self) -> bool:
        return (self.path / f"fsdp2_step_{self.planned.steps}" / "digests.json").is_file()

    def train(self) -> None:
        """Starts pretrain.py, which continues what was stopped, and waits for it."""
        started_at, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log = self.path.with_name(f"{self.path.name}.log")
        code = run_to_its_end(pretrain_command(self.bench.recipe, self.settings()), log)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        record = self.record
        record["cpu_seconds"] += after.ru_utime - before.ru_utime
        record["wall_seconds"] += time.monotonic() - started_at
        self.keep(record)
        if not self.is_trained:
            if code in (0, 75):
                raise StoppedError(f"{self.path.name} was stopped")
            raise RunFailedError(f"{self.path.name} failed (exit code {code}); see {log}")

    def settings(self) -> dict[str, Any]:
        """All that is set on the command line of the run."""
        planned = self.planned
        return {
            **planned.settings,
            "lr": self.lr,
            "seed": self.seed,
            "epochs": planned.epochs,
            "schedule_steps": planned.steps,
            "max_steps": planned.steps,
            "checkpoint_path": self.path,
            "checkpoint_interval": planned.epochs,
            "checkpoint_steps": self.steps[0],
            "checkpoint_start": False,
            "keep_last": "null",
            "data_workers": 0,  # one process, whose seconds are the run's
        }

    def answers(self, part: Part, step: int) -> dict[str, list[int]]:
        """Right (1) or wrong (0) for each item of a part, by task; asked once."""
        record = self.record
        scored = record["scores"].setdefault(part, {})
        if str(step) not in scored:
            self.bench.require_time()
            scored[str(step)] = _answers(self, self.bench.items[part], step)
            self.keep(record)
        return {task: [int(bit) for bit in bits] for task, bits in scored[str(step)].items()}

    def tokens_at(self, step: int) -> int:
        """Tokens trained on, without padding."""
        return read_checkpoint(self.path / f"fsdp2_step_{step}").progress.tokens

    def choices(self) -> dict[str, Any]:
        """What the run found on this machine: device, kernels, threads."""
        return recorded_choices(self.path)


def require_same_data(recorded: str | None, data: SampledData, run: Path) -> None:
    """ValueError for a finished run on other data than those it would be compared on."""
    epochs = int((recorded or "0").partition(":")[0])
    if recorded != fingerprint_of(data, min(epochs, data.num_epochs)):
        raise ValueError(
            f"{run} was trained on other data than those in {data.folder}; choose another output, "
            "or bring the data back"
        )


def run_to_its_end(command: list[str], log: Path) -> int:
    """Runs a command, whose output is added to `log`; a signal to stop lets it save first."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal's Ctrl-C reaches both
            return process.wait()
        except StoppedError:
            process.terminate()
            return process.wait()


def pretrain_command(recipe: str, settings: Settings | dict[str, Any]) -> list[str]:
    """The command line of pretrain.py with these settings."""
    words = (f"{key}={value}" for key, value in settings.items())
    return [sys.executable, str(PRETRAIN), "--config-name", recipe, *words]


def composed(recipe: str, settings: Settings) -> dict[str, Any]:
    """The configuration that pretrain.py makes of these settings; ValueError with its message."""
    command = [*pretrain_command(recipe, settings), "--cfg", "job", "--resolve"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    return yaml.safe_load(done.stdout)


def read_items(path: Path) -> list[Row]:
    """The rows of a JSONL file that `scripts/make_reasoning_data.py` wrote."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; make the data with scripts/make_reasoning_data.py, whose items "
            "its verifiers can score"
        )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise ValueError(f"{path} has no items; make the data with more of them")
    return rows


def _answers(run: TrainedRun, items: Sequence[Row], step: int) -> dict[str, str]:
    """One digit an item, by task."""
    loaded = load_model(ModelOptions(ckpt_path=run.path, ckpt_step=step, device=run.bench.device))
    # Room for any true answer and its end: what goes on longer is wrong.
    true_lens = [len(loaded.prompt_format.encode_response(row["response"])) for row in items]
    found = loaded.engine.generate(
        [(row["condition"], row["instruction"]) for row in items],
        loaded.prompt_format,
        max_new_tokens=max(true_lens) + 1,
    )
    texts = {answer.index: answer.text for answer in found if answer.finish_reason == "stop"}
    right: dict[str, str] = defaultdict(str)
    for index, row in enumerate(items):
        is_right = index in texts and score(row, texts[index]) == 1.0
        right[row["task"]] += str(int(is_right))
    return dict(right)
