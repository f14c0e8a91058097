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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from data_io.options import print_help
from evaluation.command_line import ENGINES, Command, read_command, whole_help
from evaluation.engines import Engine, SimpleEngine
from evaluation.judging import Sheet
from evaluation.loading import OFFLINE, Loader
from evaluation.mirror import data_source
from evaluation.records import RESULTS_FILE, ResultsFolder, only_writer, open_results
from evaluation.running import Runner, in_streams
from evaluation.settings import require_conditions
from evaluation.summary import lines_of, record_of, table, versions
from training.console import refuse, say
from training.distributed import World, pick_device, start_world, stop_world


def main(arguments: Sequence[str]) -> None:
    if any(each in ("-h", "--help") for each in arguments):
        print_help(whole_help(__doc__ or ""))
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
    streams = in_streams(ENGINES[command.settings.engine].stream_of, command.planned)
    opened: Future[Engine] = Future()  # data is loaded while the model is
    in_order = [each for stream in streams for each in stream]
    # Who names benchmarks wants those; of the published ones, another may do as well.
    way_out = OFFLINE if command.settings.is_whole_file else ""
    source = data_source(command.options.data_dir)
    loader = Loader(in_order, source, opened, way_out=way_out)
    engine = open_engine(command, world)
    opened.set_result(engine)
    loader.wait_for_first()  # where there is no data, no folder is begun
    keeper = Keeper(command, engine, started_at)
    with only_writer(command.folder) if world.is_main else nullcontext():
        if world.is_main:
            keeper.open()
        world.barrier()
        finished = fingerprints_on_record(command.folder)
        seed = command.options.seed
        Runner(engine, loader, command.folder, keeper.finish, world, finished, seed).run(streams)
        if world.is_main:
            keeper.close()


def open_engine(command: Command, world: World) -> Engine:
    """The model on this process's device; says what it is."""
    engine = command.open_engine(str(world.device) if world.size > 1 else None)
    if isinstance(engine, SimpleEngine):
        require_conditions(command.settings, engine.prompt_format.conditions)
    say(world, engine.description, *command.settings.notes)
    if world.size > 1:
        say(world, f"{world.size} processes, each with a share of the prompts")
    return engine


@dataclass(slots=True)
class Keeper:
    """Keeps the records, on rank 0."""

    command: Command
    engine: Engine
    started_at: float
    folder: ResultsFolder | None = None
    _seconds_before: float = 0.0  # of earlier sittings

    def open(self) -> None:
        """Begins the folder or goes on with it."""
        command = self.command
        header = {
            "name": command.name,
            "model": self.engine.identity,
            "engine": command.settings.engine,
            "versions": versions(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "settings": command.recorded_settings(self.engine),
        }
        labels = [each.plan.label for each in command.planned]
        self.folder = open_results(command.folder, header, labels)
        self._seconds_before = header["seconds"]

    def finish(self, sheet: Sheet) -> None:
        """Puts a complete benchmark on record."""
        assert self.folder is not None
        now = time.monotonic()
        self.folder.header["seconds"] = round(self._seconds_before + now - self.started_at, 3)
        record = record_of(sheet, now - sheet.started_at)
        self.folder.add(sheet.ready.label, record, lines_of(sheet))

    def close(self) -> None:
        """Writes the report and shows the figures."""
        assert self.folder is not None
        self.folder.remove_logs()
        records = self.folder.finished
        labels = [each.plan.label for each in self.command.planned]
        chosen = {label: records[label] for label in labels}
        print("\n".join(("", *table(chosen), "")))
        for label, record in chosen.items():
            print("".join(f"{label}: {note}\n" for note in record["notes"]), end="", flush=True)
        from evaluation.report import write_report  # draws: takes a second to import

        write_report(self.folder.path)
        print(f"written to {self.folder.path}: results.json, items.jsonl, report.md, report.html")


def fingerprints_on_record(folder: Path) -> dict[str, str]:
    """Of the data of the finished benchmarks, by label."""
    stored = json.loads((folder / RESULTS_FILE).read_bytes())["benchmarks"]
    return {label: record["data_fingerprint"] for label, record in stored.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
