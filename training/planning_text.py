"""A plan in words: lines for people, figures for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_io.row_planning import RowPacking
from data_io.sampled_format import SampledData
from models.cpu_block import why_no_kernels
from models.flops import total_parameters
from models.linear import set_linear_kernel
from training.building import choose_linear, compute_dtype
from training.checkpoint import Progress
from training.distributed import World, set_threads
from training.planning import GIB, USABLE_SHARE, Examples, Plan, make_plan
from training.planning_devices import this_device
from training.planning_memory import PARTS
from training.planning_speed import Fleet, Traffic
from training.schema import RunConfig
from training.summary import RunFacts

MFU = {"cuda": 0.40, "cpu": 0.50}  # the published run's; of probed products, see docs/training.md
ADVICE = (
    ("activation_checkpointing", "none", "activation_checkpointing=block"),
    ("offload_optimizer", False, "offload_optimizer=true"),
)


def plan_here(config: RunConfig, world: World) -> list[str]:
    """The plan of a run on the devices that it is started on, from its data."""
    data = SampledData.open(config.data.path)
    target_only = config.data.target_only
    packing = RowPacking.of_training(
        config.global_batch_size, world.size, target_only=target_only, micro=config.micro_batch_size
    )
    facts = RunFacts.of(config, data, packing, Progress())
    fleet = fleet_here(config, world)
    plan = make_plan(
        config,
        fleet,
        Examples.of_data(data, target_only=target_only),
        vocab_size=facts.vocab_size,
        total_steps=facts.counted_steps,
        mfu=MFU["cuda" if fleet.device.is_cuda else "cpu"],
    )
    return [*plan_lines(plan), "another machine: scripts/plan.py with gpu=... gpus=..."]


def fleet_here(config: RunConfig, world: World) -> Fleet:
    """The processes of this run; one is probed."""
    set_threads(config.num_threads, {}, world.size)
    choose_linear(config, world, None)
    if world.device.type == "cpu":
        why_no_kernels()  # loads them: they count as the process before it has a model
    dtype = compute_dtype(config.fwd_bwd_dtype, world.device)
    device = this_device(world, config.arch.hidden_size, dtype)
    set_linear_kernel("mkl")
    return Fleet(device, world.size, replicas=config.fsdp_replicas)


def plan_lines(plan: Plan, gpu_hour: float | None = None, mfu: float | None = None) -> list[str]:
    """The whole plan, as text."""
    config, fleet, speed = plan.config, plan.fleet, plan.speed
    arch, device = config.arch, fleet.device
    used = MFU["cuda" if device.is_cuda else "cpu"] if mfu is None else mfu
    whole = total_parameters(arch, plan.case.vocab_size)
    of_what = "data sheet" if device.is_cuda else "probe of products"
    lines = {
        "net": f"{arch.name}, {whole:,} parameters, vocabulary {plan.case.vocab_size:,}",
        "devices": f"{fleet.size} x {device.name}, {device.memory_gib:.1f} GiB and "
        f"{device.tflops:.3g} TFLOP/s each; weights in {fleet.shards} shard(s)"
        f"{f', {fleet.replicas} replicas' * (fleet.replicas > 1)}",
        "compute": f"{plan.dtype}, attention={plan.case.kernels.attention}, "
        f"compile={config.compile}, activation_checkpointing={config.activation_checkpointing}",
        "batch": f"{config.global_batch_size:,} tokens a step, of each device "
        f"{plan.case.num_micro} micro-batch(es) of {plan.micro_tokens:,}; {plan.examples.source}",
        "FLOPs/token": f"{speed.flops_per_token:.3g}, on average over the run",
        "speed": f"{speed.tokens_per_s:,.0f} tokens/s, {speed.tokens_per_s / fleet.size:,.0f} of "
        f"each device; a step {speed.step_s:.3g} s (computing {speed.compute_s:.3g}"
        f"{f', offloading {speed.offload_s:.2g}' * bool(speed.offload_s)}"
        f"{f', sending that nothing hides {speed.traffic.exposed_s:.2g}' * (fleet.size > 1)})",
        "time": f"{_duration(plan.hours)} for {plan.total_steps:,} steps{_cost(plan, gpu_hour)}",
        "assumed": f"{used:.0%} of the {of_what} is reached by useful FLOPs",
    }
    width = max(map(len, lines))
    text = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    return [*text, "", *memory_table(plan), "", *_verdict(plan)]


def memory_table(plan: Plan) -> list[str]:
    """Parts by moments of a step, in GiB."""
    parts = [part for part in PARTS if any(moment.parts[part] for moment in plan.moments)]
    head = f"{'GiB':<14}" + "".join(f"{moment.name:>11}" for moment in plan.moments)
    rows = [head]
    for part in parts:
        cells = "".join(f"{moment.parts[part] / GIB:>11.3f}" for moment in plan.moments)
        rows.append(f"{part:<14}{cells}")
    rows.append(
        f"{'together':<14}" + "".join(f"{moment.total / GIB:>11.3f}" for moment in plan.moments)
    )
    return rows


def _verdict(plan: Plan) -> list[str]:
    device, worst = plan.fleet.device, plan.peak
    resident = "" if device.is_cuda else "; with what malloc keeps"
    beside = "CUDA itself" if device.is_cuda else "the process before it has a model"
    lines = [
        f"peak        {plan.peak_bytes / GIB:.2f} GiB ({worst.name}{resident}), and "
        f"{device.context_gib:.2f} GiB of {beside}; {plan.usable_bytes / GIB:.2f} GiB may be used "
        f"({USABLE_SHARE:.0%} of {device.memory_gib:.1f}, less that): "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}"
    ]
    if plan.host_bytes:
        lines.append(f"host        {plan.host_bytes / GIB:.2f} GiB of its memory for each device")
    elif plan.copy_bytes:
        lines.append(
            f"of that     {plan.copy_bytes / GIB:.2f} GiB for a copy that checkpoints are written "
            "from; save=plain does without"
        )
    if plan.largest_micro:
        lines.append(f"largest     micro_batch_size={plan.largest_micro} fits")
    left = [what for key, value, what in ADVICE if getattr(plan.config, key) == value]
    if not plan.fits:
        advice = [f"micro_batch_size={plan.largest_micro}"] if plan.largest_micro else []
        if not plan.largest_micro:
            advice = [*left[: 1 + device.is_cuda], "more devices"]
        lines.append(f"try         {' or '.join(advice)}")
    if plan.config.lora or plan.config.freeze:
        lines.append("note        all weights are counted as trained; freeze and lora take less")
    return lines


def _duration(hours: float) -> str:
    return f"{hours / 24:.3g} days" if hours >= 48 else f"{hours:.3g} hours"


def _cost(plan: Plan, gpu_hour: float | None) -> str:
    if gpu_hour is None:
        return ""
    return f"; {plan.hours * plan.fleet.size * gpu_hour:,.0f} at {gpu_hour:g} a device and hour"


def scaling_lines(rows: Sequence[tuple[int, int, Traffic]], fleet: Fleet) -> list[str]:
    """What sending takes, by nodes and groups, beside what computing hides."""
    lines = [
        f"{'nodes':>6}{'devices':>9}{'replicas':>9}{'gather ms':>11}{'hidden to':>11}"
        f"{'reduce ms':>11}{'hidden to':>11}{'left ms':>9}"
    ]
    for nodes, replicas, sent in rows:
        times = (sent.gather_s, sent.gather_window_s, sent.reduce_s, sent.reduce_window_s)
        gather, gather_to, reduce, reduce_to = (each * 1e3 for each in times)
        lines.append(
            f"{nodes:>6}{nodes * fleet.per_node:>9}{replicas:>9}{gather:>11.1f}{gather_to:>11.1f}"
            f"{reduce:>11.1f}{reduce_to:>11.1f}{sent.exposed_s * 1e3:>9.1f}"
        )
    return lines


def plan_figures(plan: Plan) -> dict[str, Any]:
    """The same for programs: bytes, seconds, tokens."""
    return {
        "net": plan.config.arch.name,
        "parameters": plan.case.num_parameters,
        "vocab_size": plan.case.vocab_size,
        "devices": plan.fleet.size,
        "device": asdict(plan.fleet.device),
        "shards": plan.fleet.shards,
        "replicas": plan.fleet.replicas,
        "dtype": plan.dtype,
        "kernels": asdict(plan.case.kernels),
        "micro_tokens": plan.micro_tokens,
        "num_micro": plan.case.num_micro,
        "moments": {moment.name: dict(moment.parts) for moment in plan.moments},
        "peak_bytes": plan.peak_bytes,
        "usable_bytes": plan.usable_bytes,
        "host_bytes": plan.host_bytes,
        "fits": plan.fits,
        "largest_micro_tokens": plan.largest_micro,
        "speed": asdict(plan.speed),
        "total_steps": plan.total_steps,
        "hours": plan.hours,
    }
