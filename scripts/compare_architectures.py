"""Compares nets that train at equal FLOPs, tokens or parameters, over several seeds.

    python -m scripts.compare_architectures output=outputs/comparison \\
        nets=hrm,transformer,ut steps=800 seeds=0,1,2 lrs=2e-3,4e-3,8e-3 max_minutes=60

An entry of nets may have settings of its own: nets=hrm,hrm:arch.attn_type=causal,ut:lr=8e-3.
Other settings of pretrain.py (data.path=..., global_batch_size=...) go to every run. The first net
makes `steps` steps, the others as many as `match` gives them; differences are taken to the first.
The learning rate is chosen for each net on the data's validation part, then held-out items are
scored. One process at a time. The same command goes on with what was stopped; what is done is not
done again, also under another name=, for other nets or more seeds.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_io.sampled_format import SampledData
from evaluation.comparison.intervals import accuracies
from evaluation.comparison.plan import (
    Entry,
    Match,
    Planned,
    parse_entries,
    parse_settings,
    plan_all,
)
from evaluation.comparison.report import Compared, write_report
from evaluation.comparison.runs import Bench, RunFailedError, StoppedError, composed, read_items
from evaluation.comparison.tuning import ChosenLR, choose_lr
from models.flops import core_parameters
from training.console import refuse
from training.distributed import set_threads

EXIT_CODE = 75  # as of pretrain.py: not finished, the same command goes on
NETS = "hrm,transformer,trm,trm_match_recurrence,rins,ut"
# Fixed, so that all runs compute alike: a probe might choose differently from run to run.
FIXED = {"data.path": "data/reasoning", "linear": "mkl", "num_threads": "1", "device": "auto"}


@dataclass(frozen=True, slots=True)
class Options:
    """The comparison's own options."""

    output: Path
    nets: list[Entry]
    match: Match
    steps: int
    seeds: list[int]
    lrs: list[float]
    max_minutes: float
    recipe: str
    name: str


def parse(arguments: Sequence[str]) -> tuple[Options, dict[str, str]]:
    """Options and the settings of all runs; both are written key=value."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare_architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for runs and reports")
    for name, read, default, meaning in (
        ("nets", parse_entries, NETS, "entries of the comparison"),
        ("match", one_of(*get_args(Match)), "flops", "what is equal: flops, tokens or parameters"),
        ("steps", positive(int), "800", "steps of the first net"),
        ("seeds", listed(int), "0,1,2", "of the first weights; the first one also tunes"),
        ("lrs", listed(positive(float)), "2e-3,4e-3,8e-3", "peak learning rates to choose from"),
        ("max_minutes", positive(float), "60", "then stop, between two runs"),
        ("recipe", str, "cfg_quickstart", "configuration of pretrain.py"),
        ("name", str, "comparison", "of the report"),
    ):
        add(
            f"--{name}", type=explained(read), default=default, help=f"{meaning}; default {default}"
        )
    own = {action.dest for action in parser._actions} | {"h"}
    chosen, others = [], []
    for argument in arguments:
        is_own = argument.partition("=")[0].lstrip("-") in own
        (chosen if is_own else others).append(re.sub(r"^(?=[a-z_]+=)", "--", argument))
    settings = parse_settings([argument.removeprefix("--") for argument in others])
    return Options(**vars(parser.parse_args(chosen))), {**FIXED, **settings}


def explained(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` for argparse, which shows the text of this error alone."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reader


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        if kind(text) <= 0:
            raise ValueError(f"{text} must be above 0")
        return kind(text)

    return number


def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        found = [read(part) for part in text.split(",")]
        if len(set(found)) < len(found):
            raise ValueError(f"{text} names a value twice; each counts once")
        return found

    return values


def one_of(*choices: str) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return choice


def compare(options: Options, settings: dict[str, str]) -> list[Compared]:
    """All runs, trained and scored: first the choice of learning rates, then every seed."""
    stop_at = time.monotonic() + 60 * options.max_minutes
    planned = plan_all(
        options.nets,
        settings,
        match=options.match,
        steps=options.steps,
        compose=lambda of_entry: composed(options.recipe, of_entry),
    )
    show_plan(planned)
    data = SampledData.open(settings["data.path"])
    bench = Bench(
        output=options.output,
        recipe=options.recipe,
        data=data,
        items={
            "validation": read_items(data.folder / "validation.jsonl"),
            "held_out": read_items(data.folder / "held_out.jsonl"),
        },
        device=settings["device"],
        stop_at=stop_at,
    )
    compared = []
    for entry in planned:
        chosen = choose_lr(bench, entry, options.lrs, options.seeds[0])
        say(f"{entry.entry.label}: lr {chosen.lr:g} {chosen.note} {tried_text(chosen)}".rstrip())
        runs = [bench.run(entry, chosen.lr, seed) for seed in options.seeds]
        compared.append(Compared(entry, chosen, runs))
        final = accuracies(compared[-1].final)
        say(f"{entry.entry.label}: {', '.join(f'{task} {each}' for task, each in final.items())}")
    return compared


def show_plan(planned: list[Planned]) -> None:
    for each in planned:
        say(
            f"{each.entry.label}: {core_parameters(each.arch):,} core weights, {each.steps:,} "
            f"steps, {each.flops_at(each.steps):.3g} training FLOPs"
        )


def tried_text(chosen: ChosenLR) -> str:
    accuracies_by_lr = ", ".join(f"{lr:g} {value:.3f}" for lr, value in chosen.tried.items())
    return f"(validation: {accuracies_by_lr})" if chosen.tried else ""


def say(line: str) -> None:
    print(line, flush=True)


def stop(*_: object) -> NoReturn:
    raise StoppedError("SIGTERM")


def main() -> None:
    """Command line."""
    signal.signal(signal.SIGTERM, stop)
    try:
        options, settings = parse(sys.argv[1:])
        set_threads(int(settings["num_threads"]), {}, 1)
        compared = compare(options, settings)
    except (ValueError, OSError, RunFailedError) as error:
        refuse(str(error))
    except (StoppedError, KeyboardInterrupt) as reason:
        say(f"stopped: {reason or 'interrupted'}; the same command goes on, finished runs are kept")
        sys.exit(EXIT_CODE)
    about = {
        "command": ["python", "-m", "scripts.compare_architectures", *sys.argv[1:]],
        "match": options.match,
        "recipe": options.recipe,
        "settings": settings,
    }
    write_report(options.output, options.name, compared, about)
    say((options.output / f"{options.name}.md").read_text())
    say(f"{options.output}/{options.name}.json, .md and .png")


if __name__ == "__main__":
    main()
