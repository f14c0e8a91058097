"""Trains a recurrent language model: build, continue, loop, save.

    python pretrain.py                                       # the published XL run, on one device
    torchrun --nproc_per_node=8 pretrain.py arch/size@arch=L lr=2.5e-4 global_batch_size=172032
    python pretrain.py --config-name cfg_sft data.path=... resume_from=...

The same command continues a stopped run. The only file that knows Hydra.
Longer than 300 lines: a run from its command to its end, in the order in which it happens.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data_io.row_planning import RowPacking, heaviest_cursors
from data_io.sampled_format import SampledData
from dataset_new import PrefixLMDataset
from evaluation.watching import Watch, WatchPlan
from models.batch import PackedBatch
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.agreement import on_keepers, on_main
from training.building import build_model, build_optimizer
from training.checkpoint import Progress, RunDirectory, training_state
from training.command_line import checked_overrides, parse_config
from training.compiling import CompileClock
from training.console import give_up, refuse, say
from training.diagnostics import watched
from training.disks import find_disks, told_disks
from training.distributed import World, set_deterministic, set_threads, start_world, stop_world
from training.environment import check_floors, keep_tokenizer, record_environment, recorded_choices
from training.guards import Guard, sums_of_logger
from training.inherited_arch import chosen_arch, inherit_arch
from training.interrupts import SaveSchedule, StopRequests
from training.parts import first_sound, published
from training.planning_text import plan_here
from training.prefetch import load_global_batches
from training.rehearsal import Rehearsal, bytes_in, digest
from training.run_names import names_in_sweep, resolve_run
from training.run_records import require_same_vocabulary
from training.same_data import agree_on_data, data_record
from training.saving import Saving
from training.schedule import scheduled
from training.schema import RunConfig
from training.starting import Start, agree_on_start, load_start
from training.step import train_step
from training.step_check import BadStepError
from training.summary import RunFacts, summary_lines
from training.telemetry import MetricsLogger
from training.trackers import open_tracker
from training.watchdog import Watchdog

INTERRUPTED = 128 + signal.SIGINT
CONFIG_DIR = Path(__file__).parent / "config"
SHOWS_TRACEBACKS = bool(os.environ.get("HYDRA_FULL_ERROR"))  # instead of one message


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that the loop needs."""

    config: RunConfig
    world: World
    data: SampledData
    packing: RowPacking
    facts: RunFacts
    model: LanguageModel
    optimizer: AdamATan2
    directory: RunDirectory
    logger: MetricsLogger
    watch: Watch
    guard: Guard
    saving: Saving


def train(run: Run, progress: Progress) -> tuple[str, int]:
    """The loop: every epoch, every global batch, a step; how it ended, and the exit code."""
    config = run.config
    schedule = SaveSchedule(run.world, config.checkpoint_steps, config.checkpoint_minutes)
    compile_clock = CompileClock()
    limits = (config.max_steps, config.max_minutes, run.watch.spent, run.saving.has_failed)
    lock = run.directory.lock
    watchdog = Watchdog(run.world, config.hang_minutes, progress.step, held=lock)
    with StopRequests(run.world, *limits) as requests, watchdog, run.saving:
        if progress.step == 0 and (config.checkpoint_start or run.guard.needs_start):
            save(run, "fsdp2_step_0", progress)
        if requests.is_complete(progress.step):
            return requests.outcome(progress.step), 0
        run.watch.look_if_due(progress, requests)  # it was stopped while looking
        for epoch in range(progress.epoch, config.epochs):
            for micro_batches in global_batches(run, progress):
                watchdog.step = (progress := step(run, micro_batches, progress)).step
                if run.guard.is_rewinding:
                    return "", 0
                say(run.world, *compile_clock.news())
                run.watch.look_if_due(progress, requests)
                must_stop = requests.reason(progress.step)
                if must_stop or schedule.is_due(progress.step):
                    save(run, f"fsdp2_step_{progress.step}", progress)
                if must_stop:
                    return requests.outcome(progress.step), requests.exit_code
            progress = Progress(epoch + 1, 0, progress.step, progress.tokens)
            if (epoch + 1) % config.checkpoint_interval == 0 or epoch + 1 == config.epochs:
                save(run, f"fsdp2_epoch_{epoch + 1}", progress)
    run.watch.look_at_end(progress)
    return "done", 0


def global_batches(run: Run, progress: Progress) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of each global batch of the epoch, from where the run stands."""
    position = {"epoch": progress.epoch, "cursor": progress.cursor, "rank": run.world.rank}
    dataset = PrefixLMDataset(run.data, run.packing, num_slots=run.facts.num_slots, **position)
    return load_global_batches(dataset, run.world.device, num_workers=run.config.data_workers)


def step(run: Run, micro_batches: list[PackedBatch], progress: Progress) -> Progress:
    """One optimizer step on one global batch."""
    config, world, batch = run.config, run.world, micro_batches[-1]
    num_tokens = progress.tokens + batch.global_num_tokens
    progress = Progress(progress.epoch, batch.next_cursor, progress.step + 1, num_tokens)
    if run.guard.passes_over(progress.step):
        return progress
    lr, backprop_steps = scheduled(progress.step, run.facts.total_steps, config)
    run.optimizer.set_lr(lr)
    # Gradients are summed over ranks. The packing is the same everywhere, so the divisor is known.
    divisor = max(1, batch.global_num_scored) / world.size
    is_watched = config.log_recurrence and run.logger.is_due(progress.step)
    with run.guard.watching(progress):
        with watched(run.model, run.optimizer, micro_batches, world, is_watched) as figures:
            sums = train_step(
                run.model, run.optimizer, micro_batches, divisor, backprop_steps, run.guard.check
            )
        run.logger.add(sums, progress, {"train/lr": lr, "bp_steps": backprop_steps, **figures})
    return progress


def save(run: Run, name: str, progress: Progress) -> None:
    """Publishes a checkpoint of everything that training needs, now or soon."""
    state = training_state(run.model, run.optimizer)
    run.saving.save(name, state, progress, run.logger.state() | run.guard.state())


def rehearse(run: Run, start: Progress) -> list[str]:
    """Two steps on the heaviest global batches as at the end of the run, saved and read back."""
    progress, rehearsal = Progress(), Rehearsal(run.world.device)
    last = Progress(step=run.facts.counted_steps - 1)
    for number, cursor in enumerate(heaviest_cursors(run.data, run.packing)):
        micro_batches = next(global_batches(run, Progress(cursor=cursor)))
        with rehearsal.timed(f"step {number + 1}"):
            progress = step(run, micro_batches, last)
    run.watch.rehearse(progress, rehearsal.timed)
    before = digest(training_state(run.model, run.optimizer))
    with rehearsal.timed("saving"):
        save(run, f"fsdp2_step_{progress.step}", progress)
    with rehearsal.timed("loading"):
        checkpoint, damage = first_sound(run.directory, reversed(published(run.directory)[0]))
        if checkpoint is None:
            raise OSError(f"what was saved is not sound: {damage}")
        checkpoint.restore(run.model, run.optimizer, is_verified=True)
    if digest(training_state(run.model, run.optimizer)) != before:
        raise OSError(f"{run.directory.path}: what was read back is not what was saved")
    run.logger.close()
    saved = sum(on_keepers(run.world, lambda: bytes_in(run.directory.path)))
    return rehearsal.lines(run.facts.counted_steps - start.step, saved)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a run before it has a model: checked, and agreed on by all ranks."""

    config: RunConfig
    world: World
    data: SampledData
    packing: RowPacking
    watched: WatchPlan
    directory: RunDirectory
    start: Start
    chosen: dict[str, Any]  # what the run that is continued chose when it began


def prepare(
    config: RunConfig, notes: list[str], world: World, *, in_sweep: bool = False
) -> Prepared | None:
    """Checks everything that can be without a model; None where nothing is left to do."""
    data = SampledData.open(config.data.path)
    batch_tokens, target_only = config.global_batch_size, config.data.target_only
    packing = RowPacking.of_training(
        batch_tokens, world.size, target_only=target_only, micro=config.micro_batch_size
    )
    config, reason = resolve_run(config, world)
    path = Path(str(config.checkpoint_path))
    say(world, f"run         {path} ({reason})", *notes)
    world = replace(world, disks=find_disks(path, world))
    if world.disks and config.benchmarks:
        raise ValueError(
            f"benchmarks are asked of all ranks, whose answers meet in {path}, but each node has a "
            "disk of its own; leave benchmarks out, or give a checkpoint_path that all nodes share"
        )
    directory = RunDirectory(path, world)
    start = agree_on_start(directory, config)
    say(world, *start.notes)
    if in_sweep and start.checkpoint and start.notes:
        raise ValueError(f"{directory.path} is of another sweep; give another run_name")
    if start.is_finished:
        say(world, f"finished already: {config.epochs} epochs; another run_name starts another run")
        return None
    if start.source:
        say(world, *require_same_vocabulary(Path(str(config.resume_from)), data))
    chosen = choices_of(directory)
    agreed = {"recorded": chosen, "checkpoint": start.checkpoint, "world": world}
    say(world, *agree_on_data(directory.path, data, config, **agreed))
    watched = WatchPlan.open(config, data, packing)
    say(world, *watched.notes)
    if config.dry_run:
        directory = directory.aside()
    return Prepared(config, world, data, packing, watched, directory, start, chosen)


def choices_of(directory: RunDirectory) -> dict[str, Any]:
    """What the run chose when it began, on all ranks: rank 0 has the record."""
    return on_main(directory.world, lambda: recorded_choices(directory.path))


def build(prepared: Prepared) -> Run:
    """The model and all that goes with it, in the state in which the run begins."""
    config, world, directory = prepared.config, prepared.world, prepared.directory
    data, start, progress = prepared.data, prepared.start, prepared.start.progress
    threads, threads_reason = set_threads(config.num_threads, prepared.chosen, world.size)
    facts = RunFacts.of(config, data, prepared.packing, progress)
    torch.manual_seed(config.seed)
    built = build_model(config, facts.vocab_size, world, prepared.chosen)
    model, optimizer = built.model, build_optimizer(config, built.model)
    loaded = load_start(start, config, model, optimizer)
    say(world, *directory.create(config.model_dump(), data.metadata.train_metadata()))
    tracker, tracker_note = open_tracker(config, directory.path, world, step=progress.step)
    saving, saving_note = Saving.begin(config, directory, training_state(model, optimizer))
    lines = {**built.lines, **loaded, "threads": f"{threads} ({threads_reason})"}
    lines |= {"saving": saving_note}
    lines |= {"disks": told_disks(world.disks)} if world.disks else {}
    lines |= prepared.watched.lines
    say(world, *summary_lines(config, facts, {**lines, "tracker": tracker_note}))
    on_keepers(world, lambda: keep_tokenizer(directory.path, data))
    if world.is_main:
        found = {**data_record(data, config.epochs), "processes": world.size}
        directory.data = found["data"]
        record_environment(directory.path, {**built.chosen, **found, "threads": threads})
    intervals = {"log_interval": config.log_interval, "total_steps": facts.counted_steps}
    logger = MetricsLogger(directory.path, world, **intervals, start=progress, tracker=tracker)
    if start.checkpoint:
        logger.restore(sums_of_logger(start.checkpoint.log_state))
    watch = prepared.watched.begin(
        directory.path, logger, model=model, optimizer=optimizer, start=progress, facts=facts
    )
    guard, packing = Guard(config, directory, start.checkpoint), prepared.packing
    return Run(
        *(config, world, data, packing, facts),
        *(model, optimizer, directory, logger, watch, guard, saving),
    )


@hydra.main(version_base=None, config_path="config", config_name="cfg_pretrain")
def main(raw: DictConfig) -> None:
    """Runs a composed configuration, and turns bad input into one message and exit code 2."""
    run = None
    try:
        check_floors()
        container = OmegaConf.to_container(raw, resolve=True)
        assert isinstance(container, dict)
        plain = {str(key): value for key, value in container.items()}
        command = HydraConfig.get()
        in_sweep = command.mode is RunMode.MULTIRUN
        plain |= names_in_sweep(plain, command.job.num) if in_sweep else {}
        sources = command.runtime.config_sources
        folders = [Path(source.path) for source in sources if source.schema == "file"]
        chosen = chosen_arch(command.overrides.task, str(command.job.config_name), folders)
        plain, inherited = inherit_arch(plain, chosen)
        config, notes = parse_config(plain)
        set_deterministic(config.deterministic)
        world = start_world(config.device, config.hang_minutes)
        if config.plan:
            return say(world, *plan_here(config, world))
        prepared = prepare(config, [*notes, *inherited], world, in_sweep=in_sweep)
        if prepared is None:
            return None
        with prepared.directory.discarded() if config.dry_run else prepared.directory.lock:
            run = build(prepared)
            if config.dry_run:
                return say(world, *rehearse(run, prepared.start.progress), "nothing is kept")
            outcome, exit_code = train(run, prepared.start.progress)
            while run.guard.is_rewinding:
                run.logger.close()
                chosen = choices_of(run.directory)
                prepared = replace(prepared, start=run.guard.rewound(), chosen=chosen)
                run = None
                gc.collect()  # two models may not fit
                run = build(prepared)
                outcome, exit_code = train(run, prepared.start.progress)
            run.logger.close()
        say(world, f"{outcome}: {run.directory.path}")
        if exit_code:
            sys.exit(exit_code)
    except BadStepError as error:
        assert run is not None
        run.logger.close()
        give_up(run.directory, str(error))
    except (ValueError, OSError) as error:
        if SHOWS_TRACEBACKS:
            raise
        if run:  # it was training: a full disk, a bad token id in data too large to scan
            run.logger.close()
            refuse(f"{error}; HYDRA_FULL_ERROR=1 shows where")
        refuse(str(error))
    except KeyboardInterrupt:  # while nothing waits for it: before training begins
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
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
