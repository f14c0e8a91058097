"""How often ranks exchange weights and gradients in a step, counted in a trace of it.

    torchrun --nproc_per_node=2 scripts/count_collectives.py
    torchrun --nproc_per_node=4 scripts/count_collectives.py replicas=2 micro_batches=4

A small net takes a step as a run does, on CPUs over gloo, under torch's profiler; then the same
step with one setting of `training.distributed` undone at a time. What is counted are the calls of
rank 0, in forward and backward pass.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import parse_options  # noqa: E402
from models.attention.sdpa import SdpaAttention  # noqa: E402
from models.batch import PackedBatch, PackedLayout  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from training.console import refuse, say  # noqa: E402
from training.distributed import (  # noqa: E402
    World,
    reshard,
    shard_model,
    start_world,
    stop_world,
)
from training.export_format import ARCH_ADAPTER  # noqa: E402
from training.step import accumulate_gradients  # noqa: E402

NETS: dict[str, dict[str, Any]] = {
    "hrm": {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3},
    "transformer": {"name": "transformer"},
}
SIZES = {"n_layers": 4, "hidden_size": 64, "num_heads": 4}
VOCAB_SIZE, SEQ_LEN, NUM_SEQS = 512, 16, 8
KINDS = {"all-gather": "allgather", "reduce-scatter": "reduce_scatter", "all-reduce": "allreduce"}

Undo = Callable[[FSDPModule], None]
# What a step would be with torch's own choice in place of ours.
UNDONE: dict[str, Undo | None] = {
    "as it is": None,
    "reshard after forward": lambda module: module.set_reshard_after_forward(True),
    "reshard after backward": lambda module: module.set_reshard_after_backward(True),
    "reduce every micro-batch": None,
}


class CountOptions(BaseModel):
    """What is stepped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    net: Literal["hrm", "transformer"] = Field(default="hrm", description="hrm (bp 5), transformer")
    replicas: PositiveInt = Field(default=1, description="as fsdp_replicas")
    micro_batches: PositiveInt = Field(default=3, description="of a step")
    output: Path | None = Field(default=None, description="JSON file of the counts")


def main(arguments: list[str]) -> None:
    """Counts, and prints a row for each setting."""
    options = parse_options(CountOptions, arguments, __doc__ or "")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    world = start_world("cpu")
    if world.size == 1:
        raise ValueError(
            "one process sends nothing; start it with torchrun --nproc_per_node=2 "
            "scripts/count_collectives.py"
        )
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    say(world, f"{'':<28}" + "".join(f"{kind:>16}" for kind in KINDS))
    for setting in UNDONE:
        counts = counted(setting, options, world)
        found[setting] = counts
        cells = "".join(f"{counts[kind]:>16}" for kind in KINDS)
        say(world, f"{setting:<28}{cells}")
    groups = sum(
        1 for module in sharded(options, world).modules() if isinstance(module, FSDPModule)
    )
    say(world, f"{options.net}: {groups} groups of weights, {options.micro_batches} micro-batches")
    if options.output and world.is_main:
        whole = {"ranks": world.size, **options.model_dump(mode="json", exclude={"output"})}
        text = json.dumps({**whole, "groups": groups, "counts": found}, indent=2)
        options.output.write_text(text + "\n", encoding="utf-8")
    stop_world()


def sharded(options: CountOptions, world: World) -> LanguageModel:
    """The net, spread over the ranks as in a run."""
    torch.manual_seed(0)
    config = ARCH_ADAPTER.validate_python({**NETS[options.net], **SIZES})
    model = LanguageModel(config, VOCAB_SIZE, SdpaAttention())
    shard_model(model, world, torch.float32, replicas=options.replicas)
    return model


def counted(setting: str, options: CountOptions, world: World) -> Counter[str]:
    """Collectives of one step with that setting undone, by kind, on this rank."""
    model = sharded(options, world)
    undo = UNDONE[setting]
    for module in model.modules():
        if isinstance(module, FSDPModule) and undo and module is not model:
            undo(module)  # not the root: the loss reads the head's weights after the forward pass
    batches = [random_batch(seed) for seed in range(options.micro_batches)]
    parts = [[batch] for batch in batches] if setting == "reduce every micro-batch" else [batches]

    def step() -> None:
        for part in parts:  # each part ends with a reduction
            accumulate_gradients(model, part, 1.0, None)
        reshard(model)
        model.zero_grad(set_to_none=True)

    step()  # the first one sets hooks up
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = [event.name.lower() for event in profiler.events() or ()]
    return Counter(
        {
            kind: sum(name.startswith("c10d::") and part in name for name in names)
            for kind, part in KINDS.items()
        }
    )


def random_batch(seed: int) -> PackedBatch:
    """A row of short examples, all of it scored."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, lengths = NUM_SEQS * SEQ_LEN, torch.full((NUM_SEQS,), SEQ_LEN)
    tokens = torch.randint(1, VOCAB_SIZE, (num_tokens,), generator=generator).int()
    return PackedBatch(
        tokens=tokens,
        labels=tokens,
        positions=torch.arange(SEQ_LEN).repeat(NUM_SEQS).int(),
        layout=PackedLayout.from_lengths(lengths // 2, lengths - lengths // 2, NUM_SEQS),
        indices=torch.arange(NUM_SEQS),
        num_scored=num_tokens,
        global_num_scored=num_tokens,
        global_num_tokens=num_tokens,
        next_cursor=0,
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        refuse(str(problem))
