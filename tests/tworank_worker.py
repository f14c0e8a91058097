"""What two ranks compute, for tests/test_two_ranks.py, which runs this under torchrun and compares.

    torchrun --nproc_per_node=2 tests/tworank_worker.py INBOX OUTBOX [GOLDEN_CASE ...]

INBOX holds sampled data and a run saved by one process. Tensors are left in OUTBOX, whole.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from net_cases import NETS, build, read_case
from run_cases import by_our_names, whole_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_cases import (
    BACKPROP_STEPS,
    StepRecord,
    golden_run,
    set_weights,
    train_recorded,
    train_rows,
)

from data_io.row_planning import RowPacking
from data_io.sampled_format import SampledData
from dataset_new import PrefixLMDataset
from models.batch import PackedBatch
from models.language_model import LanguageModel
from models.lora import LoraConfig, add_adapters, is_adapter
from models.transformer import Block
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress, RunDirectory, training_state
from training.compiling import COMPILED, CompileMode, compile_model
from training.distributed import World, shard_model, start_world, stop_world

PACKING = RowPacking(256, num_replicas=2, drop_last_batch=True, target_only=True)
MICRO_PACKING = replace(PACKING, micro_batch_size=64)
NUM_SLOTS = 64
LR, EMA = 5e-4, 0.9
BFLOAT16_NETS = MICRO_NETS = ("hrm", "transformer")
SAVED_NET, SAVED_NAME = "hrm", "fsdp2_step_3"
GREETING = "from rank 0: é"


@dataclass(frozen=True)
class Options:
    """How a net saves memory, what of it is compiled, and what of it is trained."""

    recomputed: Literal["none", "block", "attention"] = "none"
    offloads: bool = False
    compiled: CompileMode = "none"
    frozen: str = ""  # part of a parameter's name
    lora: LoraConfig | None = None


OPTIONS = {  # by kind of job
    "hrm.recomputed": Options(recomputed="block", offloads=True),
    "transformer.recomputed": Options(recomputed="attention", offloads=True),
    "transformer.blocks": Options(compiled="block"),
    "hrm.stacks": Options(compiled="stack"),
    "transformer.step": Options(compiled="step"),
    "ut.adapters": Options(lora=LoraConfig(rank=3), recomputed="block"),
    "rins.own_adapters": Options(lora=LoraConfig(rank=3, per_cycle=True), recomputed="attention"),
    "transformer.compiled_adapters": Options(lora=LoraConfig(rank=3), compiled="block"),
    "transformer.frozen": Options(frozen="embed_tokens"),
    "ut.frozen_stack": Options(frozen="L_module"),
}


def rows_of(data: Path, rank: int, packing: RowPacking = PACKING) -> list[list[PackedBatch]]:
    """The micro-batches of a rank's first rows, as many rows as `train_rows` takes."""
    dataset = PrefixLMDataset(
        SampledData.open(data), packing, num_slots=NUM_SLOTS, epoch=0, rank=rank
    )
    rows: list[list[PackedBatch]] = []
    for batch in dataset:
        if batch.micro_index == 0:
            if len(rows) == len(BACKPROP_STEPS):
                break
            rows.append([])
        rows[-1].append(batch)
    return rows


def seeded_net(
    net: str, world: World, dtype: torch.dtype = torch.float32, options: Options = Options()
) -> tuple[LanguageModel, AdamATan2]:
    """A tiny net with the same weights whoever builds it, sharded over the world."""
    torch.manual_seed(1)
    model = build(NETS[net])
    choose_trained(model, options)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = options.recomputed
    compile_model(model, options.compiled, backend="aot_eager")
    shard_model(model, world, dtype, unit=COMPILED.get(options.compiled, Block))
    state_device = torch.device("cpu") if options.offloads else None
    trained = [param for param in model.parameters() if param.requires_grad]
    return model, AdamATan2(trained, lr=LR, ema=EMA, state_device=state_device)


def choose_trained(model: LanguageModel, options: Options) -> None:
    if options.lora:
        add_adapters(model, options.lora)
    for name, param in model.named_parameters():
        if options.lora or options.frozen:
            param.requires_grad_(is_adapter(name) if options.lora else options.frozen not in name)
        if name.endswith("lora_B"):  # zero at first: nothing would reach A
            torch.nn.init.normal_(param.data, std=0.03)


def record_tensors(records: list[StepRecord]) -> dict[str, Tensor]:
    """The losses and reduced gradients of a run, to be kept in one file."""
    tensors = {f"loss.{step}": record.sums.loss for step, record in enumerate(records)}
    for step, record in enumerate(records):
        for name, gradient in record.gradients.items():
            tensors[f"gradient.{step}.{name}"] = gradient
    return tensors


def state_tensors(model: LanguageModel, optimizer: AdamATan2) -> dict[str, Tensor]:
    """All tensors of a run, to be kept in one file."""
    return {
        f"{kind}.{name}": tensor
        for kind, part in whole_state(model, optimizer).items()
        for name, tensor in part.items()
    }


def try_collectives(outbox: Path, world: World) -> None:
    total = world.sum(torch.tensor([1, 10 * world.rank]))
    text = world.broadcast(GREETING if world.is_main else "")
    empty = world.broadcast("" if world.is_main else "not this")
    (outbox / f"world.rank{world.rank}.txt").write_text(repr((total.tolist(), text, empty)))
    world.barrier()


def train_golden(folder: Path, outbox: Path, world: World) -> None:
    case, tensors = read_case(folder), load_file(folder / "tensors.safetensors")
    run, progress = golden_run(case, folder, outbox / "runs" / folder.name, world)
    set_weights(run.model, run.optimizer, by_our_names(tensors, "init."))
    records = train_recorded(run, progress, len(case["log"]))
    found = record_tensors(records) | state_tensors(run.model, run.optimizer)
    for step, record in enumerate(records):
        (batch,), sums = record.micro_batches, record.sums
        counts = (sums.correct_tokens, sums.scored_tokens)
        counts = (*counts, sums.correct_sequences, sums.scored_sequences)
        found |= {
            f"inputs.{step}": batch.tokens,
            f"labels.{step}": batch.labels,
            f"position_ids.{step}": batch.positions,
            f"prefix_lens.{step}": batch.layout.prefix_lens,
            f"causal_lens.{step}": batch.layout.causal_lens,
            f"numseqs.{step}": batch.layout.num_seqs,
            f"lr.{step}": torch.tensor(record.lr, dtype=torch.float64),
            f"divisor.{step}": torch.tensor(record.divisor, dtype=torch.float64),
            f"counts.{step}": torch.stack(counts),
        }
    folder = outbox / "golden" / folder.name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / f"rank{world.rank}.safetensors")


def train_nets(inbox: Path, outbox: Path, world: World) -> None:
    whole = rows_of(inbox / "data", world.rank)
    split = rows_of(inbox / "data", world.rank, MICRO_PACKING)
    jobs = [(net, torch.float32, whole) for net in NETS]
    jobs += [(net, torch.bfloat16, whole) for net in BFLOAT16_NETS]
    jobs += [(net, torch.float32, split) for net in MICRO_NETS]
    for net, dtype, rows in jobs:
        model, optimizer = seeded_net(net, world, dtype)
        records = train_rows(model, optimizer, rows, world)
        found = record_tensors(records) | state_tensors(model, optimizer)
        kind = f"{net}.{dtype}" if rows is whole else f"{net}.micro"
        save_file(found, outbox / f"{kind}.rank{world.rank}.safetensors")
        if kind == f"{SAVED_NET}.{torch.float32}":
            save(outbox / "run", model, optimizer, world)


def train_options(inbox: Path, outbox: Path, world: World, *, compiled: bool) -> None:
    """The nets of OPTIONS that are compiled, or those that are not."""
    rows = rows_of(inbox / "data", world.rank, MICRO_PACKING)
    for kind, options in OPTIONS.items():
        if (options.compiled != "none") is compiled:
            model, optimizer = seeded_net(kind.split(".")[0], world, options=options)
            records = train_rows(model, optimizer, rows, world)
            found = record_tensors(records) | state_tensors(model, optimizer)
            save_file(found, outbox / f"{kind}.rank{world.rank}.safetensors")


def save(run: Path, model: LanguageModel, optimizer: AdamATan2, world: World) -> None:
    directory = RunDirectory(run, world)
    directory.create({}, {})
    directory.save(SAVED_NAME, training_state(model, optimizer), Progress(step=3), {})


def load_what_one_process_saved(inbox: Path, outbox: Path, world: World) -> None:
    model, optimizer = seeded_net(SAVED_NET, world)
    RunDirectory(inbox / "run", world).checkpoints()[-1].restore(model, optimizer)
    tensors = state_tensors(model, optimizer)
    if world.is_main:
        save_file(tensors, outbox / "loaded.safetensors")


def main() -> None:
    part, (inbox, outbox, *golden) = sys.argv[1], map(Path, sys.argv[2:])
    world = start_world("cpu")
    if part == "compiled":
        train_options(inbox, outbox, world, compiled=True)
    else:
        try_collectives(outbox, world)
        train_nets(inbox, outbox, world)
        train_options(inbox, outbox, world, compiled=False)
        load_what_one_process_saved(inbox, outbox, world)
    for folder in golden:
        train_golden(folder, outbox, world)
    stop_world()


if __name__ == "__main__":
    main()
