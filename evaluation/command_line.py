"""The command line of `evaluation.main`: what is measured, on which engine, and where it goes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from data_io.options import fields_of, help_text, parse_options
from evaluation.benchmarks import BENCHMARKS
from evaluation.engines import Engine, SimpleEngine, generation_for
from evaluation.loading import Planned
from evaluation.records import folder_name, require_name
from evaluation.settings import EvaluationSettings, config_path, read_settings
from evaluation.vllm_engine import VLLMEngine
from inference.model_folder import ModelOptions

PUBLISHED_CONFIG, PUBLISHED_NAME = "hrm_benchmarking", "published"
ENGINES: dict[str, type[SimpleEngine] | type[VLLMEngine]] = {
    "SimpleEngine": SimpleEngine,
    "VLLMEngine": VLLMEngine,
}
# Which model it is stands in the records of their own; how it is computed changes no answer.
NO_SETTINGS = ("ckpt_path", "ckpt_epoch", "ckpt_step", "ckpt_use_ema", "device", "attention")
NO_SETTINGS += ("decode", "dtype", "tokenizer_path")
GENERATION_HELP = """
how answers are made (generation_config.KEY=VALUE, for all benchmarks; the file may say otherwise
for single ones):
  batch_size        answers made at a time, at most; halved where memory runs out [100]
  max_context       tokens of prompt and answer together, within what the model has [1024]
  max_tokens        tokens of an answer, at most (null: as many as fit) [null]
  temperature       of sampling (0: the likeliest token) [0]
  condition         condition names, such as synth,cot [direct]
  prompt_template   text around a prompt, with {prompt} where it goes; never parsed [{prompt}]
  stop              texts that end an answer (VLLMEngine alone, which has no batch_size,
                    max_context and condition)

further keys of the file: engine (SimpleEngine, VLLMEngine), benchmarks=[{name: ..., ...}]; with
VLLMEngine every other key goes to vLLM (max_model_len, gpu_memory_utilization, ...)
"""


class EvaluationOptions(BaseModel):
    """Where things come from and go to; all else is in the file and in `ModelOptions`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str = Field(
        default=PUBLISHED_CONFIG,
        description="file of settings, or the name of one that comes along",
    )
    run_only: str | None = Field(
        default=None,
        description=f"benchmarks alone: [MATH,DROP]. There are {', '.join(BENCHMARKS)}",
    )
    data_dir: Path | None = Field(
        default=None, description="mirror of the data sets (null: the hub, or its cache)"
    )
    name: str | None = Field(
        default=None, description="of the folder in results/ (null: that of the file, or published)"
    )
    results_dir: Path | None = Field(
        default=None, description="in place of RUN/results, or results/NAME for vLLM"
    )
    seed: NonNegativeInt = Field(default=0, description="of sampling, for temperature above 0")


@dataclass(frozen=True, slots=True)
class Command:
    """A checked command."""

    options: EvaluationOptions
    settings: EvaluationSettings
    planned: list[Planned]
    model: ModelOptions | None  # None: vLLM
    name: str

    @property
    def ckpt_path(self) -> str:
        return str(self.settings.engine_settings["ckpt_path"])

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.options.results_dir is not None:
            return self.options.results_dir / self.name
        if self.model is not None:
            return self.model.ckpt_path / "results" / self.name
        return Path("results") / folder_name(self.ckpt_path) / self.name

    def open_engine(self, device: str | None = None) -> Engine:
        """Loads the model, on `device` in place of the one given.

        ValueError or FileNotFoundError where there is none.
        """
        if self.model is not None:
            if not self.model.ckpt_path.exists():
                raise FileNotFoundError(
                    f"ckpt_path={self.ckpt_path} is no folder here: SimpleEngine takes a run "
                    "directory or an exported folder. A model by its name goes through vLLM: "
                    "config=evaluation/config/vllm_benchmarking.yaml"
                )
            changes = {} if device is None else {"device": device}
            return SimpleEngine(self.model.model_copy(update=changes))
        given = dict(self.settings.engine_settings)
        return VLLMEngine(str(given.pop("ckpt_path")), given)

    def recorded_settings(self, engine: Engine) -> dict[str, Any]:
        """All that an answer depends on beside weights, tokenizer and data."""
        identity = engine.identity
        others = self.settings.engine_settings.items()
        return {
            "engine": self.settings.engine,
            "seed": self.options.seed,
            **{key: identity[key] for key in ("dtype", "depth", "max_context") if key in identity},
            **{
                key: value for key, value in others if self.model is None and key not in NO_SETTINGS
            },
            "benchmarks": {each.plan.label: recorded_plan(each) for each in self.planned},
        }


def recorded_plan(planned: Planned) -> dict[str, Any]:
    """A benchmark's settings; its batch size, which changes no answer, is left out."""
    benchmark = planned.plan.benchmark
    generation = {key: value for key, value in planned.generation.items() if key != "batch_size"}
    return {
        "benchmark": benchmark.name,
        "settings": benchmark.model_dump(mode="json"),
        "generation": generation,
        "prompt_template": planned.plan.prompt_template,
    }


def read_command(arguments: Sequence[str]) -> Command:
    """The command that the words make. ValueError or FileNotFoundError says what is wrong."""
    own = set(EvaluationOptions.model_fields) - {"run_only"}
    ours = [each for each in arguments if each.partition("=")[0] in own]
    others = [each for each in arguments if each.partition("=")[0] not in own]
    options = parse_options(EvaluationOptions, ours, "")
    file = config_file(options.config)
    settings = read_settings(file.read_text(encoding="utf-8"), others, engines=ENGINES)
    options = with_those_of_the_file(options, settings.engine_settings)
    default = PUBLISHED_NAME if file == config_path(PUBLISHED_CONFIG) else file.stem
    name = require_name(options.name or default)
    if not isinstance(settings.engine_settings.get("ckpt_path"), str):
        raise ValueError("ckpt_path=... is required: a run directory or an exported folder")
    model = None
    if settings.engine == "SimpleEngine":
        model = model_options(settings.engine_settings)
    return Command(options, settings, planned(settings), model, name)


def config_file(text: str) -> Path:
    """The file of settings by its path, or by its name in this package."""
    if Path(text).is_file():
        return Path(text)
    if config_path(text).is_file():
        return config_path(text)
    there = sorted(path.stem for path in config_path("x").parent.glob("*.yaml"))
    raise FileNotFoundError(f"config={text} is no file; there are also {', '.join(there)}")


def with_those_of_the_file(
    options: EvaluationOptions, engine_settings: dict[str, Any]
) -> EvaluationOptions:
    """The command line's options, and those that only the file has; they leave its settings."""
    known = set(EvaluationOptions.model_fields) - {"run_only", "config"}
    of_file = {key: engine_settings.pop(key) for key in known & engine_settings.keys()}
    given = options.model_dump(exclude_unset=True)
    try:
        return EvaluationOptions.model_validate({**of_file, **given})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def model_options(engine_settings: Mapping[str, Any]) -> ModelOptions:
    """The folder and how it runs; ValueError for a key that is none of these."""
    known = set(fields_of(ModelOptions)) - {"batch_size"}
    for key in engine_settings:
        if key not in known:
            everything = [*known, *EvaluationOptions.model_fields, "engine", "benchmarks"]
            everything.append("generation_config.batch_size")
            near = difflib.get_close_matches(key, everything, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists them"
            raise ValueError(f"{key}={engine_settings[key]} is no setting of SimpleEngine; {hint}")
    try:
        return ModelOptions.model_validate(dict(engine_settings))
    except ValidationError as error:
        reasons = [
            f"{'.'.join(map(str, each['loc']))}={each['input']!r:.80}: "
            f"{each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        ]
        raise ValueError("; ".join(reasons)) from None


def planned(settings: EvaluationSettings) -> list[Planned]:
    """Each benchmark with what the engine is given of its settings."""
    keys = ENGINES[settings.engine].generation_keys
    found = []
    for plan in settings.plans:
        generation, left_out = generation_for(
            keys, plan.generation, plan.benchmark, settings.engine
        )
        notes = tuple(f"{settings.engine} has no {key}; asked without" for key in left_out)
        found.append(Planned(plan, generation, notes))
    return found


def whole_help(usage: str) -> str:
    """`usage`, then everything that a command may say."""
    model = help_text(ModelOptions, "the model and how it runs (SimpleEngine):")
    lines = [
        line
        for line in model.splitlines()
        if line != "options (key=value):" and not line.lstrip().startswith("batch_size")
    ]
    parts = [help_text(EvaluationOptions, usage), "\n".join(lines), GENERATION_HELP.strip()]
    return "\n\n".join(parts)
