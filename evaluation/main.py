"""Measures a model on the published benchmarks, or on puzzles that need no data.

    python -m evaluation.main ckpt_path=RUN [run_only=[MATH,DROP]] [generation_config.batch_size=16]
    python -m evaluation.main ckpt_path=RUN run_only=[reasoning_gym]       needs no network
    python -m evaluation.main config=evaluation/config/vllm_benchmarking.yaml ckpt_path=NAME
    torchrun --nproc_per_node=8 -m evaluation.main ckpt_path=RUN ...       prompts divided

RUN is a run directory or an exported folder; NAME a model that vLLM loads. Results go to
RUN/results/<name>/: results.json, items.jsonl, report.md, report.html. A command that was stopped
goes on where it was. Data sets come from the hub, or from a mirror (`python -m evaluation.fetch`).
Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from evaluation.command_line import Command, read_command, whole_help
from evaluation.engines import Engine, SimpleEngine
from evaluation.judging import Sheet
from evaluation.loading import Loader
from evaluation.mirror import data_source
from evaluation.records import RESULTS_FILE, ResultsFolder, open_results
from evaluation.running import Runner, in_streams
from evaluation.settings import require_conditions
from evaluation.summary import lines_of, record_of, table, versions
from training.console import refuse, say
from training.distributed import World, pick_device, start_world, stop_world


def main(arguments: Sequence[str]) -> None:
    if any(each in ("-h", "--help") for each in arguments):
        print(whole_help(__doc__ or ""))
        return
    try:
        command = read_command(arguments)
        world = world_of(command)
        evaluate(command, world)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    finally:
        stop_world()


def world_of(command: Command) -> World:
    """This process among those of torchrun, on its device."""
    if command.model is not None:
        return start_world(command.model.device.partition(":")[0])
    if "RANK" in os.environ:
        raise ValueError(
            "vLLM divides the work among GPUs itself: run one process with "
            "tensor_parallel_size=N or data_parallel_size=N"
        )
    return World(rank=0, size=1, device=pick_device("cpu"))


def evaluate(command: Command, world: World) -> None:
    """Everything from loading to the report; all ranks call it."""
    started_at = time.monotonic()
    opened: Future[Engine] = Future()
    # Loading begins while the model does: streams are told from settings and the model's context.
    engine = open_engine(command, world)
    opened.set_result(engine)
    streams = in_streams(engine, command.planned)
    loader = Loader(
        [each for stream in streams for each in stream],
        data_source(command.options.data_dir),
        opened,
    )
    keeper = Keeper(command, engine, started_at)
    if world.is_main:
        keeper.open()
    world.barrier()
    runner = Runner(engine, loader, command.folder, keeper.finish, world, seed=command.options.seed)
    runner.finished = finished_in(command)
    runner.run(streams)
    if world.is_main:
        keeper.close()
