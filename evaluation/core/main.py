"""CORE (the nanochat family's metric of base models) and chat tasks, through the packed engine.

    python -m evaluation.core.main ckpt_path=RUN bundle=DIR [tasks=[copa,piqa]] [max_per_task=500]
    python -m evaluation.core.main ckpt_path=RUN chat=[ARC-Easy,GSM8K] data_dir=MIRROR
    torchrun --nproc_per_node=8 -m evaluation.core.main ckpt_path=RUN bundle=DIR

RUN is a run directory or an exported folder. CORE asks for the option of the lowest mean token
loss, and is the mean over tasks of accuracy with guessing taken out; chat multiple choice compares
letters after the prompt. Results go to RUN/results/core/ as those of evaluation.main do. A command
that was stopped goes on where it was.
Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from evaluation.core.cache import PromptCache, tokenizer_fingerprint
from evaluation.core.command_line import (
    Chosen,
    CoreOptions,
    core_tasks,
    planned_tasks,
    read_options,
)
from evaluation.core.engine import ScoringEngine
from evaluation.core.task import CoreTask, mean_centred
from evaluation.engines import Engine
from evaluation.judging import Sheet
from evaluation.loading import Loader, Planned
from evaluation.mirror import data_source
from evaluation.records import RESULTS_FILE, ResultsFolder, only_writer, open_results
from evaluation.running import Runner, in_streams
from evaluation.summary import lines_of, record_of, table, versions
from training.console import refuse, say
from training.distributed import World, start_world, stop_world


def main(arguments: Sequence[str]) -> None:
    try:
        options = read_options(arguments, __doc__ or "")
        evaluate(options, start_world(options.device.partition(":")[0]))
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    finally:
        stop_world()


def evaluate(options: CoreOptions, world: World) -> None:
    """Everything from loading to the figures; all ranks call it."""
    started_at = time.monotonic()
    core = core_tasks(options)
    device = str(world.device) if world.size > 1 else options.device
    engine = ScoringEngine(options.model_copy(update={"device": device}), core)
    chosen = Chosen.of(options, engine)
    engine.cache = PromptCache(
        options.prompts_folder,
        tokenizer_fingerprint(engine.prompt_format),
        lambda line: say(world, line),
    )
    planned = planned_tasks(options, core, chosen, engine.max_context)
    say(world, engine.description, *_told(options, chosen))
    streams = in_streams(engine.stream_of, planned)
    opened: Future[Engine] = Future()
    opened.set_result(engine)
    in_order = [each for stream in streams for each in stream]
    loader = Loader(in_order, data_source(options.data_dir), opened)
    loader.wait_for_first()  # where there is no data, no folder is begun
    keeper = Keeper(options, engine, in_order, started_at)
    with only_writer(options.folder) if world.is_main else nullcontext():
        if world.is_main:
            keeper.open()
        world.barrier()
        finished = _fingerprints_on_record(options)
        Runner(engine, loader, options.folder, keeper.finish, world, finished).run(streams)
        if world.is_main:
            keeper.close()


def _told(options: CoreOptions, chosen: Chosen) -> list[str]:
    """How the model is asked, and where prompts are kept."""
    lines = []
    if options.bundle is not None:
        asked = f" and condition={chosen.condition}" if chosen.prefix == "prompt" else ""
        lines.append(f"raw text is given with prefix={chosen.prefix}{asked}: {chosen.reason}")
    if options.chat:
        lines.append(f"chat tasks are asked with condition={chosen.condition}")
    where = options.prompts_folder
    lines.append(f"tokenized prompts: {where or 'not kept; cache_dir=DIR keeps them'}")
    return lines


@dataclass(slots=True)
class Keeper:
    """Keeps the records, on rank 0."""

    options: CoreOptions
    engine: ScoringEngine
    planned: Sequence[Planned]
    started_at: float
    folder: ResultsFolder = field(init=False)
    _seconds_before: float = 0.0  # of earlier sittings

    def open(self) -> None:
        """Begins the folder or goes on with it."""
        identity = self.engine.identity
        settings = {
            **{key: identity[key] for key in ("dtype", "depth", "max_context")},
            "benchmarks": {each.plan.label: _settings_of(each) for each in self.planned},
        }
        header = {
            "name": self.options.folder.name,
            "model": identity,
            "engine": "ScoringEngine",
            "versions": versions(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": 0.0,
            "settings": settings,
        }
        labels = [each.plan.label for each in self.planned]
        self.folder = open_results(self.options.folder, header, labels)
        self._seconds_before = header["seconds"]

    def finish(self, sheet: Sheet) -> None:
        """Puts a complete task on record, and the means over tasks so far."""
        now, label = time.monotonic(), sheet.ready.label
        record = record_of(sheet, now - sheet.started_at)
        if label in self.engine.notes:
            record["notes"].append(self.engine.notes[label])
        header = self.folder.header
        header["seconds"] = round(self._seconds_before + now - self.started_at, 3)
        header["means"] = means_of({**self.folder.finished, label: record})
        self.folder.add(label, record, lines_of(sheet))

    def close(self) -> None:
        """Writes the report and shows the figures."""
        self.folder.remove_logs()
        records = self.folder.finished
        chosen = {each.plan.label: records[each.plan.label] for each in self.planned}
        self.folder.header["means"] = means = means_of(records)
        self.folder.save()
        print("\n".join(("", *_table(chosen), "")))
        for label, record in chosen.items():
            print("".join(f"{label}: {note}\n" for note in record["notes"]), end="")
        for name, mean in means.items():
            error = "" if mean["standard_error"] is None else f" ± {mean['standard_error']:.4f}"
            print(f"{name} {mean['value']:.4f}{error}, {mean['of']}")
        from evaluation.report import write_report  # draws: takes a second to import

        write_report(self.folder.path)
        print(f"written to {self.folder.path}: results.json, items.jsonl, report.md, report.html")


def means_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """CORE, and the like over chat tasks, of what is on record.

    Tasks of CORE count together that were asked alike: where there are several ways, the one that
    most tasks have.
    """
    means = {}
    for name in ("CORE", "chat"):
        ways: dict[str, dict[str, Mapping[str, Any]]] = {}
        for label, record in records.items():
            if (record["benchmark"] == CoreTask.name) == (name == "CORE"):
                ways.setdefault(_way_of(record), {})[label] = record
        if not ways:
            continue
        way, asked = max(ways.items(), key=lambda pair: len(pair[1]))
        value, error = mean_centred(asked)
        told = f"mean of centred accuracy over {len(asked)} tasks{way}"
        others = sum(map(len, ways.values())) - len(asked)
        if others:
            told += f"; {others} that were asked otherwise are left out"
        means[name] = {"value": value, "standard_error": error, "tasks": list(asked), "of": told}
    return means


def _way_of(record: Mapping[str, Any]) -> str:
    """How a task was asked, in words; what differs by task alone is left out."""
    settings, generation = record["settings"], record["generation"]
    rows = settings.get("max_per_task") or settings.get("max_items")
    parts = [f"prefix={generation['prefix']}"] if "prefix" in generation else []
    if generation.get("condition"):
        parts.append(f"condition={generation['condition']}")
    if rows:
        parts.append(f"at most {rows:,} rows each")
    return "".join(f", {part}" for part in parts)


def _table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The usual table, with `centred` at its end."""
    heading, *rows = table(records)
    width = max(map(len, (heading, *rows)))
    values = [f"{record['published']['centred']:.4f}" for record in records.values()]
    return [
        f"{line.ljust(width)}  {value:>7}"
        for line, value in zip((heading, *rows), ("centred", *values), strict=True)
    ]


def _settings_of(planned: Planned) -> dict[str, Any]:
    """What its answers depend on; how many are made at a time is left out."""
    generation = {key: value for key, value in planned.generation.items() if key != "batch_size"}
    benchmark = planned.plan.benchmark
    return {
        "benchmark": benchmark.name,
        "settings": benchmark.model_dump(mode="json"),
        "generation": generation,
    }


def _fingerprints_on_record(options: CoreOptions) -> dict[str, str]:
    stored = json.loads((options.folder / RESULTS_FILE).read_bytes())["benchmarks"]
    return {label: record["data_fingerprint"] for label, record in stored.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
