"""The command line of `evaluation.core.main`: which tasks, how raw text is given, where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data_io.options import parse_options
from evaluation.chat_tasks import CHAT_TASKS, chat_task_named
from evaluation.chat_tasks.choices import ChatChoices
from evaluation.core.bundle import Bundle
from evaluation.core.engine import ScoringEngine
from evaluation.core.prompts import PrefixKind
from evaluation.core.task import CoreTask
from evaluation.loading import Planned
from evaluation.settings import BenchmarkPlan
from inference.asking import pick_condition
from inference.model_folder import ModelOptions

CACHE_FOLDER = ".prompts"
ALL = "all"


class CoreOptions(ModelOptions):
    """A model, and what it is asked."""

    bundle: Path | None = Field(
        default=None, description="folder with core.yaml, eval_meta_data.csv, eval_data"
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="of the bundle, by label (empty: all of them)"
    )
    chat: tuple[str, ...] = Field(
        default=(), description=f"chat tasks: all, or of {', '.join(CHAT_TASKS)}"
    )
    max_per_task: PositiveInt | None = Field(
        default=None, description="rows of a task: shuffled, then cut (null: all of them)"
    )
    prefix: Literal["auto", "bos", "prompt"] = Field(
        default="auto",
        description="raw text follows a one-token prefix (bos), or is asked as a prompt, with the "
        "continuation as its answer (prompt); auto: bos where the model was trained on raw text",
    )
    condition: str | None = Field(
        default=None, description="of prompts (null: direct where the model knows it)"
    )
    max_output_tokens: PositiveInt = Field(
        default=512, description="of a chat task's answer that is generated"
    )
    data_dir: Path | None = Field(
        default=None, description="mirror of the chat tasks' data (null: the hub, or its cache)"
    )
    cache_dir: Path | None = Field(
        default=None,
        description=f"of tokenized prompts (null: {CACHE_FOLDER} in the bundle or data_dir)",
    )
    output: Path | None = Field(
        default=None, description="folder of the results (null: results/core in ckpt_path)"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.bundle is None and not self.chat:
            raise ValueError(
                "give bundle=DIR for CORE (`python -m evaluation.fetch bundle=DIR` gets it), "
                f"chat=[...] for chat tasks ({ALL}, or of {', '.join(CHAT_TASKS)}), or both"
            )
        if self.bundle is None and self.tasks:
            raise ValueError(f"tasks=[{','.join(self.tasks)}] are of a bundle; give bundle=DIR")
        return self

    @property
    def folder(self) -> Path:
        return self.output or self.ckpt_path / "results" / "core"

    @property
    def prompts_folder(self) -> Path | None:
        """Where tokenized prompts are kept; None: nowhere, as the data is on the hub."""
        if self.cache_dir is not None:
            return self.cache_dir
        beside = self.bundle or self.data_dir
        return None if beside is None else beside / CACHE_FOLDER


@dataclass(frozen=True, slots=True)
class Chosen:
    """How raw text and prompts are given to a model."""

    prefix: PrefixKind
    condition: str | None  # None: nothing is asked as a prompt
    reason: str

    @classmethod
    def of(cls, options: CoreOptions, engine: ScoringEngine) -> Chosen:
        """ValueError for a condition that the model does not have."""
        if options.prefix == "auto":
            prefix, reason = engine.trained_prefix()
        else:
            prefix, reason = options.prefix, "as asked for"
        condition = None
        if options.chat or prefix == "prompt":
            condition = pick_condition(engine.prompt_format, options.condition)
        return cls(prefix, condition, reason)


def core_tasks(options: CoreOptions) -> dict[str, CoreTask]:
    """The chosen tasks of the bundle by label; every file is there. ValueError otherwise."""
    if options.bundle is None:
        return {}
    bundle = Bundle.open(options.bundle)
    tasks = {}
    for entry in bundle.chosen(options.tasks):
        bundle.file_of(entry)
        tasks[entry.label] = CoreTask(
            task=entry,
            baseline=bundle.baselines[entry.label],
            max_per_task=options.max_per_task,
            bundle=options.bundle,
        )
    return tasks


def planned_tasks(
    options: CoreOptions, core: dict[str, CoreTask], chosen: Chosen, max_context: int
) -> list[Planned]:
    """Everything that is asked, with its settings."""
    planned = []
    for label, task in core.items():
        generation: dict[str, Any] = {"core": label, "prefix": chosen.prefix}
        if chosen.prefix == "prompt":
            generation["condition"] = chosen.condition
        planned.append(Planned(BenchmarkPlan(label, task, generation), generation))
    for name in _chat_names(options.chat):
        task = chat_task_named(name)(max_items=options.max_per_task)
        generation = {"condition": chosen.condition, "max_context": max_context}
        if isinstance(task, ChatChoices):
            generation |= {"letters": list(task.letters), "max_tokens": 1}
        else:
            generation |= {
                "max_tokens": options.max_output_tokens,
                "batch_size": options.batch_size,
            }
        planned.append(Planned(BenchmarkPlan(task.name, task, generation), generation))
    return planned


def _chat_names(names: Sequence[str]) -> list[str]:
    return list(CHAT_TASKS) if ALL in names else list(dict.fromkeys(names))


def read_options(arguments: Sequence[str], usage: str) -> CoreOptions:
    """ValueError says what is wrong; unknown chat tasks are named before a model is loaded."""
    options = parse_options(CoreOptions, arguments, usage)
    for name in _chat_names(options.chat):
        chat_task_named(name)
    return options
