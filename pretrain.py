"""Trains a recurrent language model: build, continue, loop, save.

    python pretrain.py                                       # the published XL run, on one device
    torchrun --nproc_per_node=8 pretrain.py arch/size@arch=L lr=2.5e-4 global_batch_size=172032
    python pretrain.py --config-name cfg_sft data.path=... resume_from=...

The same command continues a stopped run. The only file that knows Hydra.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data_io.sampled_format import SampledData
from dataset_new import EpochPlan, PrefixLMDataset, RowPacking, plan_epochs
from models.batch import PackedBatch
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.building import build_model
from training.checkpoint import Progress, RunDirectory, training_state
from training.command_line import checked_overrides, parse_config
from training.console import give_up, refuse, say
from training.distributed import World, set_threads, start_world, stop_world
from training.environment import check_floors, record_environment, recorded_choices
from training.interrupts import SaveSchedule, StopRequests
from training.prefetch import load_batches
from training.run_names import names_in_sweep, resolve_run
from training.schedule import backprop_steps_at, check_schedule, lr_at, published_total_steps
from training.schema import RunConfig
from training.starting import agree_on_start, fingerprint_of, load_start, require_same_data
from training.step import NonFiniteLossError, train_step
from training.summary import RunFacts, summary_lines
from training.telemetry import MetricsLogger

CONFIG_DIR = Path(__file__).parent / "config"
SHOWS_TRACEBACKS = bool(os.environ.get("HYDRA_FULL_ERROR"))  # instead of one message


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the loop needs."""

    config: RunConfig
    world: World
    data: SampledData
    packing: RowPacking
    num_slots: int
    total_steps: int
    model: LanguageModel
    optimizer: AdamATan2
    directory: RunDirectory
    logger: MetricsLogger


def train(run: Run, progress: Progress) -> tuple[str, int]:
    """The loop: every epoch, every global batch, a step; how it ended, and the exit code."""
    config = run.config
    limits = {"max_steps": config.max_steps, "max_minutes": config.max_minutes}
    schedule = SaveSchedule(run.world, config.checkpoint_steps, config.checkpoint_minutes)
    with StopRequests(run.world, **limits) as requests:
        if config.checkpoint_start and progress.step == 0:
            save(run, "fsdp2_step_0", progress)
        for epoch in range(progress.epoch, config.epochs):
            for micro_batches in global_batches(run, progress):
                progress = step(run, micro_batches, progress)
                stop_reason = requests.reason(progress.step)
                if stop_reason or schedule.is_due(progress.step):
                    save(run, f"fsdp2_step_{progress.step}", progress)
                    run.directory.prune_steps(config.keep_last)
                if stop_reason:
                    outcome = f"stopped at step {progress.step:,} ({stop_reason})"
                    return f"{outcome}; the same command goes on", requests.exit_code
            progress = Progress(epoch + 1, 0, progress.step, progress.tokens)
            if (epoch + 1) % config.checkpoint_interval == 0 or epoch + 1 == config.epochs:
                save(run, f"fsdp2_epoch_{epoch + 1}", progress)
    return "done", 0


def global_batches(run: Run, progress: Progress) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of each global batch of the current epoch, on the device.

    They start where the run stands; each is on its way while the one before it is computed.
    """
    is_cuda = run.world.device.type == "cuda"
    dataset = PrefixLMDataset(
        run.data,
        run.packing,
        num_slots=run.num_slots,
        epoch=progress.epoch,
        cursor=progress.cursor,
        rank=run.world.rank,
    )
    complete: list[PackedBatch] = []
    coming: list[PackedBatch] = []
    for batch in load_batches(dataset, num_workers=run.config.data_workers, pin_memory=is_cuda):
        coming.append(batch.to(run.world.device, non_blocking=is_cuda))
        if batch.micro_index + 1 < batch.num_micro:
            continue
        if complete:
            yield complete
        complete, coming = coming, []
    if complete:
        yield complete


def step(run: Run, micro_batches: list[PackedBatch], progress: Progress) -> Progress:
    """One optimizer step on one global batch."""
    config, world, batch = run.config, run.world, micro_batches[-1]
    progress = Progress(
        progress.epoch,
        batch.next_cursor,
        progress.step + 1,
        progress.tokens + batch.global_num_tokens,
    )
    lr = lr_at(
        progress.step,
        lr=config.lr,
        min_ratio=config.lr_min_ratio,
        warmup_steps=config.lr_warmup_steps,
        total_steps=run.total_steps,
    )
    backprop_steps = backprop_steps_at(progress.step, run.total_steps, config.arch)
    run.optimizer.set_lr(lr)
    # Gradients are summed over ranks. The packing is the same everywhere, so the divisor is known.
    divisor = max(1, batch.global_num_scored) / world.size
    try:
        sums = train_step(run.model, run.optimizer, micro_batches, divisor, backprop_steps, world)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"step {progress.step}: {error}") from None
    run.logger.add(sums, progress, {"train/lr": lr, "bp_steps": backprop_steps})
    return progress


def save(run: Run, name: str, progress: Progress) -> None:
    """Publishes a checkpoint of everything that training needs."""
    state = training_state(run.model, run.optimizer)
    run.directory.save(name, state, progress, run.logger.state())


def set_up(config: RunConfig, notes: list[str], world: World) -> tuple[Run, Progress] | None:
    """Checks everything and builds a run; None where there is nothing left to do."""
    data = SampledData.open(config.data.path)
    if config.global_batch_size % world.size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not divisible by the {world.size} "
            f"ranks; use e.g. {-(-config.global_batch_size // world.size) * world.size}"
        )
    config, reason = resolve_run(config, world)
    directory = RunDirectory(Path(str(config.checkpoint_path)), world)
    say(world, f"run         {directory.path} ({reason})", *notes)
    start = agree_on_start(directory, config, world)
    say(world, *start.notes)
    if start.is_finished:
        say(world, f"finished already: {config.epochs} epochs; another run_name starts another run")
        return None
    chosen = recorded_choices(directory.path)
    require_same_data(chosen.get("data"), data, config)
    threads, threads_reason = set_threads(config.num_threads, chosen, world.size)
    packing, plan, facts = plan_run(config, data, world, start.progress)
    torch.manual_seed(config.seed)
    built = build_model(config, facts.vocab_size, world, chosen)
    model = built.model
    optimizer = AdamATan2(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        ema=config.ema,
    )
    choices = built.lines | load_start(start, config, model, optimizer)
    directory.create(config.model_dump(), data.metadata.train_metadata())
    choices["threads"] = f"{threads} ({threads_reason})"
    say(world, *summary_lines(config, facts, choices))
    if world.is_main:
        found = {"data": fingerprint_of(data, config.epochs), "threads": threads}
        found["processes"] = world.size
        record_environment(directory.path, {**built.chosen, **found})
    logger = MetricsLogger(
        directory.path,
        world,
        log_interval=config.log_interval,
        total_steps=facts.counted_steps,
        start=start.progress,
    )
    if start.checkpoint:
        logger.restore(start.checkpoint.log_state)
    run = Run(
        config=config,
        world=world,
        data=data,
        packing=packing,
        num_slots=plan.num_slots,
        total_steps=facts.total_steps,
        model=model,
        optimizer=optimizer,
        directory=directory,
        logger=logger,
    )
    return run, start.progress


def plan_run(
    config: RunConfig, data: SampledData, world: World, start: Progress
) -> tuple[RowPacking, EpochPlan, RunFacts]:
    """How examples are packed from where the run stands, and the steps that this makes in all."""
    packing = RowPacking(
        batch_max_length=config.global_batch_size // world.size,
        num_replicas=world.size,
        drop_last_batch=True,
        target_only=config.data.target_only,
        micro_batch_size=config.micro_batch_size,
    )
    plan = plan_epochs(data, packing, config.epochs, epoch=start.epoch, cursor=start.cursor)
    counted = start.step + sum(plan.steps)
    published = published_total_steps(
        config.epochs, data.metadata.total_length, config.global_batch_size
    )
    named = {"counted": counted, "published": published}
    total_steps = named.get(str(config.schedule_steps), config.schedule_steps)
    assert isinstance(total_steps, int)
    check_schedule(warmup_steps=config.lr_warmup_steps, total_steps=total_steps)
    facts = RunFacts(
        counted_steps=counted,
        filled_share=1 - plan.padding_share,
        mean_keys=plan.mean_keys,
        vocab_size=data.metadata.padded_vocab_size,
        total_steps=total_steps,
        published_steps=published,
    )
    return packing, plan, facts


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain")
def main(raw: DictConfig) -> None:
    """Runs a composed configuration, and turns bad input into one message and exit code 2."""
    prepared = None
    try:
        check_floors()
        container = OmegaConf.to_container(raw, resolve=True)
        assert isinstance(container, dict)
        plain = {str(key): value for key, value in container.items()}
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            plain |= names_in_sweep(plain, HydraConfig.get().job.num)
        config, notes = parse_config(plain)
        world = start_world(config.device)
        prepared = set_up(config, notes, world)
        if prepared:
            run, progress = prepared
            outcome, exit_code = train(run, progress)
            run.logger.close()
            say(world, f"{outcome}: {run.directory.path}")
            if exit_code:
                sys.exit(exit_code)
    except NonFiniteLossError as error:
        assert prepared is not None
        prepared[0].logger.close()
        give_up(prepared[0].directory, str(error))
    except (ValueError, OSError) as error:
        if SHOWS_TRACEBACKS:
            raise
        if prepared:  # it was training: a full disk, a bad token id in data too large to scan
            prepared[0].logger.close()
            refuse(f"{error}; HYDRA_FULL_ERROR=1 shows where")
        refuse(str(error))
    finally:
        stop_world()


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors then, and cuts no traceback
    try:
        sys.argv[1:] = checked_overrides(sys.argv[1:], CONFIG_DIR)
    except ValueError as error:
        refuse(str(error))
    os.environ["PRETRAIN_SWEEP_DIR"] = sweep_dir = f"{tempfile.gettempdir()}/sweep-{os.getpid()}"
    try:
        main()
    except CompactHydraException as error:
        refuse(f"{getattr(error, 'override', '')} {error}".replace("++", "").strip())
    finally:
        shutil.rmtree(sweep_dir, ignore_errors=True)
