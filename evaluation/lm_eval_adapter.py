"""Runs tasks of lm-evaluation-harness on a run directory or an exported folder.

    python -m evaluation.lm_eval_adapter ckpt_path=RUN --tasks arc_easy,hellaswag [--num_fewshot N]
    python -m evaluation.lm_eval_adapter ckpt_path=RUN --tasks mine --include_path DIR --limit 20

Contexts are prompts in the model's format, continuations its answers. Its packages:
pip install -r requirements-eval.txt. Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from data_io.options import help_text, parse_options
from evaluation.harness_generation import read_generation
from evaluation.harness_model import HarnessModel
from inference.asking import pick_condition
from inference.model_folder import ModelOptions
from simple_inference_engine import LoadedModel, load_model
from training.console import refuse
from training.publishing import write_atomically

INSTALL = "pip install -r requirements-eval.txt"


class AdapterOptions(ModelOptions):
    """Which model, and how its prompts and answers are made."""

    condition: str | None = Field(
        default=None,
        description="condition names, such as synth,cot (null: direct where the model knows it)",
    )
    seed: int = Field(default=0, description="of sampling, for tasks that sample")


def main(arguments: Sequence[str]) -> None:
    try:
        asked = parser().parse_intermixed_args(arguments)
        options = parse_options(AdapterOptions, asked.options, __doc__ or "")
        evaluate(options, asked)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        print("stopped; nothing is kept", file=sys.stderr)
        sys.exit(130)


def evaluate(options: AdapterOptions, asked: argparse.Namespace) -> None:
    """Everything from the tasks to the table; ValueError or OSError before the model is loaded,
    wherever that can be known."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("lm_eval_adapter runs in one process; start it without torchrun")
    settings = _given_settings(asked.gen_kwargs)
    _require_place(asked.output)
    harness = harness_package("lm_eval")
    manager = harness_package("lm_eval.tasks").TaskManager(include_path=asked.include_path)
    tasks = _known_tasks(asked.tasks, manager)
    loaded = load_model(options)
    print(loaded.description, flush=True)
    model = harness_model(loaded, pick_condition(loaded.prompt_format, options.condition), options)
    results = harness.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=asked.num_fewshot,
        limit=asked.limit,
        apply_chat_template=asked.apply_chat_template,
        gen_kwargs=settings or None,
        task_manager=manager,
        log_samples=False,
    )
    make_table = harness_package("lm_eval.utils").make_table
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if asked.output is not None:
        record = {
            "model": loaded.description,
            "condition": model.condition,
            "apply_chat_template": asked.apply_chat_template,
            "cropped": model.num_cropped,
            **results,
        }
        write_atomically(asked.output, json.dumps(record, indent=2, default=str) + "\n")
        print(f"wrote {asked.output}")


def harness_package(name: str) -> Any:
    """A module of lm-eval. ValueError names how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this needs lm-eval, which does not import here ({error}); {INSTALL}"
        ) from None


def harness_model(loaded: LoadedModel, condition: str, options: AdapterOptions) -> HarnessModel:
    """A model for `lm_eval.simple_evaluate(model=...)`."""
    base = harness_package("lm_eval.api.model").LM
    model_class = type("RecurrentLM", (HarnessModel, base), {})
    return model_class(loaded, condition, seed=options.seed)


def _known_tasks(asked: str, manager: Any) -> list[str]:
    """Names and patterns; ValueError for one that is no task, with the nearest."""
    tasks: list[str] = []
    for name in filter(None, map(str.strip, asked.split(","))):
        found = manager.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"lm-eval knows no task {name}; {hint}`lm_eval ls tasks` lists all, "
                "--include_path adds a folder of your own"
            )
        tasks += [task for task in found if task not in tasks]
    if not tasks:
        raise ValueError("--tasks names no task")
    return tasks


def _given_settings(text: str | None) -> Mapping[str, Any]:
    """key=value,... of --gen_kwargs; refused before anything is loaded."""
    settings: dict[str, Any] = {}
    for part in (text or "").split(",") if text else ():
        key, separator, value = part.strip().partition("=")
        if not separator:
            raise ValueError(f"--gen_kwargs is key=value,key=value, but one part is {part!r}")
        settings[key] = {"true": True, "false": False}.get(value.lower(), value)
    read_generation(settings)
    return settings


def _require_place(output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output} must be a file in a folder that exists")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evaluation.lm_eval_adapter",
        description=__doc__,
        epilog=help_text(AdapterOptions, "the model:"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("options", nargs="*", metavar="key=value", help="of the model, see below")
    add("--tasks", required=True, help="names or patterns of tasks and groups, with commas")
    add("--include_path", type=Path, help="folder with tasks of your own (YAML, may hold code)")
    add(
        "--num_fewshot", type=int, help="worked examples before each question (default: the task's)"
    )
    add("--limit", type=float, help="items of each task: a number, or a share below 1")
    add("--gen_kwargs", help="over the tasks' own: max_gen_toks=64,temperature=0.7,do_sample=true")
    add("--output", type=Path, help="JSON file for results, versions and settings")
    add(
        "--apply_chat_template",
        action="store_true",
        help="worked examples are turns of a conversation (default: text of the one prompt)",
    )
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
