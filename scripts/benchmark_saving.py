"""How long does training stand still for a checkpoint: saved plainly, and in the background?

    python scripts/benchmark_saving.py                      # width 1024, about 600 MB, on a CPU
    python scripts/benchmark_saving.py rounds=9 output=saving.json

A net with weights, averages and optimizer state trains on random rows; the two ways save it by
turns, to the same disk. `stall_s`: how long the call keeps the next step waiting. Steps are timed
too: while nothing is written, and while the process beside writes. Seconds are those of the clock
on the wall, since what is waited for is a disk: on a machine that does other work, compare ratios.
`stall_cpu_s` is the part that the training process itself computes or copies, without the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.options import parse_options
from models.attention import select_attention
from models.batch import PackedBatch, PackedLayout
from models.language_model import LanguageModel
from models.linear import pick_linear_kernel, set_linear_kernel
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress, RunDirectory, training_state
from training.console import refuse
from training.distributed import World
from training.export_format import ARCH_ADAPTER
from training.host_copy import num_bytes_of, pieces_of
from training.saving import Saving, WriterProcess
from training.step import train_step
from training.step_check import StepCheck

VOCAB_SIZE, WAYS = 4096, ("plain", "background")
WRITER_TIMEOUT_S = 600.0
WORTH_IT = 3.0  # times shorter: from here on `save=auto` means the background


class SavingOptions(BaseModel):
    """What is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt = Field(default=1024, description="of the net, a multiple of 64")
    layers: PositiveInt = Field(default=2, description="of the net, half of them in each stack")
    tokens: PositiveInt = Field(default=256, description="of a step")
    rounds: PositiveInt = Field(default=5, description="saves of each way")
    steps: PositiveInt = Field(default=3, description="timed in each round while nothing is saved")
    threads: PositiveInt = Field(default=1, description="of the training process")
    folder: Path | None = Field(default=None, description="on the disk to try (null: temporary)")
    output: Path | None = Field(default=None, description="JSON file of all figures")


class Trainer:
    """A net in training, and the two ways to save it."""

    def __init__(self, options: SavingOptions, folder: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(options.threads)
        device = torch.device("cpu")
        self.world = World(rank=0, size=1, device=device)
        set_linear_kernel(pick_linear_kernel(device, options.width)[0])
        settings = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
        settings |= {"n_layers": options.layers, "hidden_size": options.width}
        config = ARCH_ADAPTER.validate_python({**settings, "num_heads": options.width // 64})
        sizes = {"dtype": torch.float32, "head_size": config.answer_stack.head_size}
        attention, _ = select_attention("auto", device=device, **sizes)
        self.model = LanguageModel(config, VOCAB_SIZE, attention)
        self.optimizer = AdamATan2(self.model.parameters(), lr=1e-4, ema=0.999)
        self.batch = random_batch(options.tokens)
        self.step = 0
        pieces = pieces_of(training_state(self.model, self.optimizer))
        self.num_bytes = num_bytes_of(pieces)
        runs = {way: RunDirectory(folder / way, self.world) for way in WAYS}
        writer = WriterProcess(runs["background"], pieces, WRITER_TIMEOUT_S)
        self.ways = {"plain": Saving(runs["plain"], 1, None)}
        self.ways["background"] = Saving(runs["background"], 1, writer)
        for run in runs.values():
            run.create({}, {})

    def step_s(self) -> float:
        """Seconds that a step takes."""
        started_at = time.perf_counter()
        self.step += 1
        tokens = float(len(self.batch.tokens))
        check = StepCheck(self.world)
        train_step(self.model, self.optimizer, [self.batch], tokens, None, check)
        return time.perf_counter() - started_at

    def stall_s(self, way: str) -> tuple[float, float]:
        """Seconds until the next step may begin, and those of them that this process computes."""
        started_at, computed_s = time.perf_counter(), time.process_time()
        state, progress = training_state(self.model, self.optimizer), Progress(step=self.step)
        # An epoch's name: looking for what to prune is no part of saving.
        self.ways[way].save(f"fsdp2_epoch_{self.step}", state, progress, {})
        return time.perf_counter() - started_at, time.process_time() - computed_s

    def steps_while_it_writes(self) -> list[float]:
        """Seconds of the steps until the process beside has published what it was given."""
        found = []
        while self.ways["background"].is_writing():
            found.append(self.step_s())
        self.ways["background"].wait()
        return found


def random_batch(num_tokens: int) -> PackedBatch:
    """One example with as many tokens; all are scored."""
    tokens = torch.randint(0, VOCAB_SIZE, (num_tokens,)).int()
    lens = torch.tensor([num_tokens // 2])
    return PackedBatch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(num_tokens).int(),
        layout=PackedLayout.from_lengths(lens, num_tokens - lens, 1),
        indices=torch.arange(1),
        num_scored=num_tokens,
        global_num_scored=num_tokens,
        global_num_tokens=num_tokens,
        next_cursor=0,
    )


def measure(options: SavingOptions, folder: Path) -> dict[str, Any]:
    """All figures; the first save of each way, which also takes its memory, is told apart."""
    trainer = Trainer(options, folder)
    stalls: dict[str, list[float]] = {way: [] for way in WAYS}
    computed: dict[str, list[float]] = {way: [] for way in WAYS}
    published, alone, beside = [], [], []
    trainer.step_s()
    with trainer.ways["background"]:
        for number in range(options.rounds + 1):
            alone += [trainer.step_s() for _ in range(options.steps)]
            for way in WAYS if number % 2 else WAYS[::-1]:
                stall_s, computed_s = trainer.stall_s(way)
                stalls[way].append(stall_s)
                computed[way].append(computed_s)
                started_at = time.perf_counter() - stall_s
                if way == "background":
                    beside += trainer.steps_while_it_writes()
                    published.append(time.perf_counter() - started_at)
            told = ", ".join(f"{way} {stalls[way][-1]:.3f} s" for way in WAYS)
            print(f"round {number}: {told}", file=sys.stderr, flush=True)
            clear(folder)
    typical = {way: median(found[1:]) for way, found in stalls.items()}
    return {
        "state_mb": round(trainer.num_bytes / 1e6, 1),
        "stall_s": typical,
        "first_stall_s": {way: found[0] for way, found in stalls.items()},
        "stall_cpu_s": {way: median(found[1:]) for way, found in computed.items()},
        "ratio": typical["plain"] / typical["background"],
        "all_stalls_s": stalls,
        "published_after_s": median(published),
        "step_s": {"alone": median(alone), "beside_writer": median(beside) if beside else None},
        "slowdown_of_steps": median(beside) / median(alone) if beside else None,
        "threads": options.threads,
        "cores": len(os.sched_getaffinity(0)),
    }


def clear(folder: Path) -> None:
    """Removes what was saved, so that the disk does not fill up."""
    for checkpoint in folder.glob("*/fsdp2_*"):
        shutil.rmtree(checkpoint)


def main() -> None:
    """Command line."""
    try:
        options = parse_options(SavingOptions, sys.argv[1:], __doc__ or "")
        if options.width % 64:
            raise ValueError(f"width={options.width} is no multiple of 64, the size of a head")
        if not hasattr(os, "memfd_create"):
            raise ValueError("saving in the background needs memfd, which Linux alone has")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure(options, Path(folder))
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(found, indent=2) + "\n")
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(json.dumps(found))
    verdict = "worth it" if found["ratio"] >= WORTH_IT else f"less than {WORTH_IT} times shorter"
    print(f"the stall is {found['ratio']:.2f} times shorter: {verdict}", file=sys.stderr)


if __name__ == "__main__":
    main()
