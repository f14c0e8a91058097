"""Memory, speed, days and cost of a run before it starts, on devices that need not be here.

    python scripts/plan.py arch/net@arch=hrm arch/size@arch=XL gpus=8 gpu=h100 gpu_hour=2.5
    python scripts/plan.py gpu=rtx4090 micro_batch_size=4096 activation_checkpointing=block
    python scripts/plan.py arch/size@arch=nano data.path=DATA gpu=here json=plan.json
    python scripts/plan.py gpu=h100 nodes=1,2,4,8,16,32,64          # sending beside computing

Takes the arguments of pretrain.py (arch/net@arch and arch/size@arch, global_batch_size,
micro_batch_size, fwd_bwd_dtype, attention, compile, activation_checkpointing, offload_optimizer,
fsdp_replicas, ema, epochs and save decide), and its own below. Where data.path is a folder of
sampled data, lengths, vocabulary and number of steps are those of the data, else of the options.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import fields_of, parse_options  # noqa: E402
from data_io.row_planning import RowPacking  # noqa: E402
from data_io.sampled_format import VOCAB_MULTIPLE, SampledData  # noqa: E402
from training.checkpoint import Progress  # noqa: E402
from training.command_line import parse_config  # noqa: E402
from training.console import refuse  # noqa: E402
from training.distributed import World, pick_device  # noqa: E402
from training.planning import Examples, Plan, make_plan  # noqa: E402
from training.planning_devices import GPUS  # noqa: E402
from training.planning_speed import Fleet, nodes_table  # noqa: E402
from training.planning_text import (  # noqa: E402
    MFU,
    fleet_here,
    plan_figures,
    plan_lines,
    scaling_lines,
)
from training.publishing import write_atomically  # noqa: E402
from training.schema import RunConfig  # noqa: E402
from training.summary import RunFacts  # noqa: E402


class PlanOptions(BaseModel):
    """The devices, and what the data would say."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gpu: Literal["here", *GPUS] = Field(  # type: ignore[valid-type]
        default="here", description=f"here (speed is probed), {', '.join(GPUS)}"
    )
    gpus: PositiveInt = Field(default=1, le=1 << 20, description="devices")
    gpus_per_node: PositiveInt = Field(default=8, description="that share a fast link")
    memory_gb: PositiveFloat | None = Field(
        default=None, description="GiB of each device; null: as the device has"
    )
    network_gbit: PositiveFloat = Field(
        default=400, description="Gb/s of each device to other nodes, each way"
    )
    mfu: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of a device's FLOPs that useful ones reach; null: "
        + ", ".join(f"{share} on {kind}" for kind, share in MFU.items()),
    )
    gpu_hour: PositiveFloat | None = Field(
        default=None, description="price of a device for an hour; null: no cost is told"
    )
    vocab_size: PositiveInt = Field(
        default=65536, description="without data: token ids, rounded up to a multiple of 256"
    )
    mean_length: PositiveFloat = Field(
        default=300, ge=2, description="without data: tokens of an example"
    )
    max_length: int = Field(default=4096, ge=2, description="without data: of the longest one")
    scored_share: float = Field(default=0.5, gt=0, le=1, description="without data: of all tokens")
    epoch_tokens: PositiveFloat = Field(
        default=15e9, description="without data: tokens of an epoch (published: about 15e9)"
    )
    nodes: list[PositiveInt] = Field(
        default=[], description="also a table of sending beside computing, for so many nodes"
    )
    json_file: Path | None = Field(
        default=None, alias="json", description="file for all figures; - prints them instead"
    )


def main(arguments: list[str]) -> None:
    """Plans, and prints."""
    is_own = {a: a.partition("=")[0] in fields_of(PlanOptions) for a in arguments}
    own = [a for a in arguments if is_own[a] or a in ("-h", "--help")]
    options = parse_options(PlanOptions, own, __doc__ or "")
    config, notes = composed([a for a in arguments if a not in own])
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    fleet = fleet_of(options, config)
    plan = plan_of(options, config, fleet)
    figures = plan_figures(plan)
    lines = plan_lines(plan, options.gpu_hour, options.mfu)
    if options.nodes:
        more, rows = scaling(options, plan)
        lines += ["", *more]
        figures["nodes"] = rows
    if str(options.json_file) == "-":
        lines = [json.dumps(figures, indent=2)]
    elif options.json_file:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json_file, json.dumps(figures, indent=2) + "\n")
    print(*lines, sep="\n")


def composed(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """What pretrain.py makes of its arguments: it alone knows how they are put together."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    raw: Any = yaml.safe_load(done.stdout)
    raw["data"] = {"path": "nowhere", **{k: v for k, v in raw["data"].items() if v is not None}}
    return parse_config(raw)


def fleet_of(options: PlanOptions, config: RunConfig) -> Fleet:
    """The devices that are planned for."""
    if options.gpu == "here":
        here = fleet_here(config, World(rank=0, size=1, device=pick_device(config.device)))
        device = here.device
    else:
        device = GPUS[options.gpu]
    memory_gib = options.memory_gb or device.memory_gib
    return Fleet(
        device=type(device)(
            device.name,
            memory_gib,
            device.tflops,
            device.link_gb_s,
            device.context_gib,
            device.is_cuda,
        ),
        size=options.gpus,
        per_node=options.gpus_per_node,
        network_gb_s=options.network_gbit / 8,
        replicas=config.fsdp_replicas,
    )


def plan_of(options: PlanOptions, config: RunConfig, fleet: Fleet) -> Plan:
    """From the data where it is there; else from options, which is said."""
    mfu = options.mfu or MFU["cuda" if fleet.device.is_cuda else "cpu"]
    path, target_only = Path(config.data.path), config.data.target_only
    if path.is_dir():
        data = SampledData.open(path)
        packing = RowPacking.of_training(
            config.global_batch_size,
            fleet.size,
            target_only=target_only,
            micro=config.micro_batch_size,
        )
        facts = RunFacts.of(config, data, packing, Progress())
        vocab_size, total_steps = facts.vocab_size, facts.counted_steps
        examples = Examples.of_data(data, target_only=target_only)
    else:
        print(f"data.path={path} is not here: planned from options (--help)", file=sys.stderr)
        vocab_size = -(-options.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        total_steps = round(config.epochs * options.epoch_tokens / config.global_batch_size)
        sizes = (options.mean_length, options.max_length, options.scored_share)
        examples = Examples.made_up(*sizes)
    steps = {"vocab_size": vocab_size, "total_steps": total_steps}
    return make_plan(config, fleet, examples, mfu=mfu, **steps)


def scaling(options: PlanOptions, plan: Plan) -> tuple[list[str], list[dict[str, Any]]]:
    """Sending beside computing, where each device computes as much as in the plan."""
    rows = nodes_table(
        plan.fleet,
        plan.config.arch,
        plan.case.vocab_size,
        nodes=options.nodes,
        step_seconds=plan.speed.compute_s,
    )
    told = f"each device computes {plan.speed.compute_s:.3g} s of a step, as above"
    head = f"sending weights and gradients, once a step; {told}"
    return [head, *scaling_lines(rows, plan.fleet)], [
        {
            "nodes": nodes,
            "replicas": replicas,
            "gather_s": sent.gather_s,
            "reduce_s": sent.reduce_s,
            "exposed_s": sent.exposed_s,
        }
        for nodes, replicas, sent in rows
    ]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        refuse(str(problem))
