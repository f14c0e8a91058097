"""Does the planner say what a training step takes? Planned against measured, case by case.

    python scripts/benchmark_planner.py output=planner.json
    python scripts/benchmark_planner.py cases=[hrm,vocabulary] steps=2

Each case takes real steps in a process of its own, on one thread of a CPU, and saves a checkpoint:
the most that the process has resident (VmHWM, Linux alone) in the steps, and while it saves; and
the most that torch has allocated at a time in one more step, as its profiler sees it. The plan is
made in that process before it has a model. Speed: useful FLOPs by CPU time, as a share of the probe
that plans go by; shown, not judged.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import parse_options  # noqa: E402
from models.batch import IGNORE_LABEL, PackedBatch, PackedLayout  # noqa: E402
from models.flops import training_flops_per_token  # noqa: E402
from training.building import build_model, build_optimizer  # noqa: E402
from training.checkpoint import (  # noqa: E402
    Progress,
    RunDirectory,
    training_state,
    write_atomically,
)
from training.console import refuse  # noqa: E402
from training.distributed import World, stop_world  # noqa: E402
from training.export_format import ARCH_ADAPTER  # noqa: E402
from training.planning import GIB, Examples, Plan, make_plan  # noqa: E402
from training.planning_devices import process_bytes  # noqa: E402
from training.planning_heap import LOADED_BYTES  # noqa: E402
from training.planning_memory import MemoryCase  # noqa: E402
from training.planning_speed import Fleet  # noqa: E402
from training.planning_text import fleet_here  # noqa: E402
from training.schema import DataConfig, RunConfig  # noqa: E402
from training.step import train_step  # noqa: E402
from training.step_check import StepCheck  # noqa: E402

LIMIT = 0.10  # that a plan may be off
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EXAMPLES = Examples.made_up(100, 512, 0.5)
_HRM = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
_TRM = {"name": "trm", "H_cycles": 2, "H_bp_steps": 2, "L_cycles": 1, "L_bp_steps": 1}


@dataclass(frozen=True, slots=True)
class Case:
    """A net, its rows, and how it is trained."""

    net: dict[str, Any]
    width: int
    layers: int = 4
    vocab_size: int = 4096
    tokens: int = 4096  # of a step
    settings: dict[str, Any] = field(default_factory=dict)  # of the run

    def config(self) -> RunConfig:
        sizes = {"hidden_size": self.width, "num_heads": self.width // 32, "n_layers": self.layers}
        settings: dict[str, Any] = {"ema": 0.999, "linear": "mkl", "device": "cpu", "save": "plain"}
        arch: Any = ARCH_ADAPTER.validate_python({**self.net, **sizes})
        return RunConfig(
            arch=arch,
            data=DataConfig(path="nowhere"),
            global_batch_size=self.tokens,
            epochs=1,
            lr=1e-4,
            lr_min_ratio=1.0,
            lr_warmup_steps=0,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            num_threads=1,
            **(settings | self.settings),
        )


_TABLES = Case(_HRM, 128, vocab_size=131072, tokens=2048)
_WIDE = Case(_HRM, 768, tokens=512)
_DEEP = Case(_HRM, 256, layers=8, tokens=2048)
CASES: dict[str, Case] = {
    "nano": Case(_HRM, 64, tokens=8192, vocab_size=512),
    "hrm": _DEEP,
    "vocabulary": _TABLES,
    "checkpointing_block": replace(_DEEP, settings={"activation_checkpointing": "block"}),
    "micro_batches": Case(_HRM, 512, tokens=1024, settings={"micro_batch_size": 256}),
    "wide": _WIDE,
    "no_average": replace(_WIDE, settings={"ema": None}),
    "bf16_micro_batches": replace(
        _WIDE, settings={"fwd_bwd_dtype": "bfloat16", "micro_batch_size": 256}
    ),
    "transformer": Case({"name": "transformer"}, 256, layers=8, tokens=4096),
    "ut_post_norm": Case(
        {"name": "ut", "cycles": 4, "bp_cycles": 2, "norm_type": "post"}, 128, tokens=4096
    ),
    "vocabulary_wide": replace(_TABLES, width=256, tokens=1024),
    "checkpointing_attention": replace(_DEEP, settings={"activation_checkpointing": "attention"}),
    "trm": Case(_TRM, 128, tokens=4096),
    "rins": Case(
        {"name": "rins", "half_layers": True, "L_cycles": 7, "L_bp_cycles": 4}, 128, tokens=4096
    ),
    "hrm_onednn": replace(_DEEP, settings={"linear": "onednn"}),
    "bf16": replace(_DEEP, settings={"fwd_bwd_dtype": "bfloat16"}),
}


class BenchmarkOptions(BaseModel):
    """What is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: list[str] = Field(default=[], description=f"all, or some of {', '.join(CASES)}")
    steps: PositiveInt = Field(default=4, description="of each case; the first make the heap grow")
    output: Path | None = Field(default=None, description="JSON file of all figures")
    measure: str | None = Field(default=None, description="one case, in this process, as JSON")


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(BenchmarkOptions, arguments, __doc__ or "")
    names = [options.measure] if options.measure else options.cases or list(CASES)
    for name in names:
        if name not in CASES:
            raise ValueError(f"cases={name} does not exist; it is one of {', '.join(CASES)}")
    if not STATUS.is_file():
        raise ValueError("peaks are read from /proc/self/status, which Linux alone has")
    if options.measure:
        print(json.dumps(measure(CASES[options.measure], options.steps)))
        return
    found = {}
    heads = ("planned", "resident", "ratio", "added", "allocated", "ratio", "saving")
    print(f"{'GiB':<26}" + "".join(f"{head:>10}" for head in heads))
    for name in names:
        command = [sys.executable, __file__, f"measure={name}", f"steps={options.steps}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        found[name] = figures = json.loads(done.stdout)
        print(row(name, figures), flush=True)
        if options.output:  # after each: a run that is stopped leaves what it found
            write(options.output, found, options.steps)
    off = [name for name, figures in found.items() if abs(figures["ratio"] - 1) > LIMIT]
    told = f"; off by more: {', '.join(off)}" if off else ""
    print(f"{len(found) - len(off)} of {len(found)} within {LIMIT:.0%} of what was resident{told}")


def write(path: Path, found: dict[str, Any], steps: int) -> None:
    """All figures so far."""
    machine = {"machine": platform.processor() or "CPU", "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**machine, "steps": steps, "limit": LIMIT, "cases": found}
    write_atomically(path, json.dumps(whole, indent=2) + "\n")


def row(name: str, figures: dict[str, Any]) -> str:
    """A line of the table."""
    sizes = [figures[key] / GIB for key in ("planned_bytes", "peak_bytes", "allocated_bytes")]
    ratios = [figures[key] for key in ("ratio", "added_ratio", "allocated_ratio", "saving_ratio")]
    cells = (sizes[0], sizes[1], ratios[0], ratios[1], sizes[2], ratios[2], ratios[3])
    return f"{name:<26}" + "".join(f"{cell:>10.3f}" for cell in cells)


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Plans, then trains and saves, in this process."""
    config, world = case.config(), World(rank=0, size=1, device=torch.device("cpu"))
    fleet = fleet_here(config, world)
    reset_peak()
    base = process_bytes()
    plan = planned(case, fleet)
    built = build_model(config, case.vocab_size, world, {})
    optimizer = build_optimizer(config, built.model)

    def step(number: int) -> None:
        batches = list(micro_batches(case, plan.micro_tokens, number))
        divisor = float(batches[-1].global_num_scored)
        train_step(built.model, optimizer, batches, divisor, None, StepCheck(world))

    elapsed_s = []
    for number in range(steps):
        started_at = time.process_time()
        step(number)
        elapsed_s.append(time.process_time() - started_at)
    peak = resident("VmHWM")
    reset_peak()
    with tempfile.TemporaryDirectory(prefix="planner-") as folder:
        state = training_state(built.model, optimizer)
        RunDirectory(Path(folder) / "run", world).save("fsdp2_step_1", state, Progress(step=1), {})
    saving = resident("VmHWM")
    state_bytes = 4 * state_elements(plan.case)
    allocated = state_bytes + allocated_in(lambda: step(steps))
    stop_world()
    flops = training_flops_per_token(
        config.arch, case.vocab_size, backprop_steps=None, mean_keys=EXAMPLES.mean_keys
    )
    whole, at_saving = base + plan.peak_bytes, base + plan.moments[-1].total + LOADED_BYTES
    return {
        "base_bytes": base,
        "planned_bytes": whole,
        "peak_bytes": peak,
        "ratio": whole / peak,
        "added_ratio": (whole - base) / (peak - base),
        "allocated_bytes": allocated,
        "allocated_ratio": plan.peak.total / allocated,
        "planned_moment": plan.peak.name,
        "planned_parts": dict(plan.peak.parts),
        "saving_bytes": saving,
        "saving_ratio": at_saving / saving,
        "step_s": median(elapsed_s),
        "share_of_probe": case.tokens * flops / median(elapsed_s) / fleet.device.tflops / 1e12,
    }


def planned(case: Case, fleet: Fleet) -> Plan:
    """The plan that is held against the process."""
    settings = {"vocab_size": case.vocab_size, "total_steps": 1, "mfu": 1.0}
    return make_plan(case.config(), fleet, EXAMPLES, **settings)


def state_elements(case: MemoryCase) -> int:
    """Of weights, moments and averages."""
    return case.num_parameters * (2 + case.has_momentum + case.has_average)


def allocated_in(call: Callable[[], object]) -> int:
    """The most that torch has allocated at a time in a call, beside what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def micro_batches(case: Case, tokens: int, seed: int) -> Iterator[PackedBatch]:
    """Random tokens in rows such as the plan has; the last part of each example is scored."""
    lengths = torch.tensor(EXAMPLES.filling(tokens))
    num_slots, count = len(lengths) + 64, case.tokens // tokens
    prefix = lengths // 2
    layout = PackedLayout.from_lengths(prefix, lengths - prefix, num_slots)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    is_scored = positions >= prefix.repeat_interleave(lengths)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        drawn = torch.randint(1, case.vocab_size, (tokens,), generator=generator)
        yield PackedBatch(
            tokens=drawn.int(),
            labels=drawn.where(is_scored, IGNORE_LABEL).int(),
            positions=positions.int(),
            layout=layout,
            indices=torch.arange(num_slots),
            num_scored=int(is_scored.sum()),
            global_num_scored=count * int(is_scored.sum()),
            global_num_tokens=case.tokens,
            next_cursor=0,
        )


def reset_peak() -> None:
    """The peak counts from what is in use now on."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken again
    CLEAR_REFS.write_text("5")


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        refuse(str(problem))
