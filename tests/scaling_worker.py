"""What several ranks compute in groups that hold all weights each, for tests/test_scaling.py.

    python tests/scaling_worker.py RANKS PORT INBOX OUTBOX

INBOX holds sampled data. The ranks are forked from this process, which imports everything once.
Each way of sharding leaves losses, gradients and state, whole, in OUTBOX/<ranks>.<replicas>.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from net_cases import NETS, build
from safetensors.torch import save_file
from training_cases import train_rows
from tworank_worker import EMA, LR, record_tensors, rows_of, save, state_tensors

from data_io.row_planning import RowPacking
from models.batch import PackedBatch
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.checkpoint import RunDirectory
from training.diagnostics import UpdateFigures
from training.distributed import World, shard_model, start_world, stop_world
from training.step import accumulate_gradients, reshard
from training.step_check import BadStepError, StepCheck

NET, ROW_TOKENS = "hrm", 64
REPLICAS = {4: (1, 2, 4), 8: (1, 2)}  # by ranks
SAVED, LOADED = 2, (1, 4)  # replicas that a checkpoint is written with, and read


def rows_of_rank(data: Path, num_ranks: int, rank: int) -> list[list[PackedBatch]]:
    packing = RowPacking(ROW_TOKENS, num_replicas=num_ranks, drop_last_batch=True, target_only=True)
    return rows_of(data, rank, packing)


def seeded_net(
    world: World, replicas: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[LanguageModel, AdamATan2]:
    """The same weights on whatever ranks."""
    torch.manual_seed(1)
    model = build(NETS[NET])
    shard_model(model, world, dtype, replicas=replicas)
    return model, AdamATan2(list(model.parameters()), lr=LR, ema=EMA)


def figures(model: LanguageModel, rows: list[PackedBatch], world: World) -> dict[str, torch.Tensor]:
    """What the guards and `log_recurrence` say of a step's gradient."""
    divisor = rows[-1].global_num_scored / world.size
    sums = accumulate_gradients(model, rows, divisor, None)
    reshard(model)
    updates = UpdateFigures(model, world)
    pairs = [(p.detach(), p.grad) for p in model.parameters() if p.grad is not None]
    params = [p for p in model.parameters() if p.grad is not None]
    local = [(getattr(p, "_local_tensor", p), getattr(g, "_local_tensor", g)) for p, g in pairs]
    updates.add(params, [g for _, g in local], [p for p, _ in local], [2 * p for p, _ in local])
    check = StepCheck(world, spike_score=1e-9, losses=[0.0] * 20)
    found: dict[str, float | None] = {**updates.take()}
    try:
        check.require_sound(sums, model.parameters(), rows)
    except BadStepError as error:
        found["grad_norm"] = error.grad_norm
    return {f"figure.{name}": torch.tensor(value or 0.0) for name, value in found.items()}


def work(rank: int, size: int, port: str, inbox: Path, outbox: Path) -> None:
    where = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ.update({**where, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.set_num_threads(1)
    world = start_world("cpu")
    rows = rows_of_rank(inbox, size, rank)
    for replicas in REPLICAS[size]:
        model, optimizer = seeded_net(world, replicas)
        found = record_tensors(train_rows(model, optimizer, rows, world))
        found |= state_tensors(model, optimizer) | figures(model, rows[0], world)
        folder = outbox / f"{size}.{replicas}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(found, folder / f"rank{rank}.safetensors")
        if replicas == SAVED:
            model.zero_grad(set_to_none=True)
            save(outbox / f"run{size}", model, optimizer, world)
    for replicas in (each for each in LOADED if each in REPLICAS[size]):
        model, optimizer = seeded_net(world, replicas)
        RunDirectory(outbox / f"run{size}", world).checkpoints()[-1].restore(model, optimizer)
        tensors = state_tensors(model, optimizer)
        if world.is_main:
            save_file(tensors, outbox / f"loaded{size}.{replicas}.safetensors")
    stop_world()


def main() -> None:
    size, port, inbox, outbox = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=work, args=(rank, size, port, inbox, outbox)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
