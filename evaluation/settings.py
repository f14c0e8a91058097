"""What an evaluation is asked to do: a file, and `key=value` words of a command line on top of it.

Generation settings of a benchmark are the global `generation_config`, then what the benchmark sets
itself (multiple choice: one token), then its entry in the file. A command line changes the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from data_io.parsing import parse_yaml
from evaluation.benchmarks import BENCHMARKS, benchmark_named
from evaluation.benchmarks.protocol import Benchmark

GENERATION, TEMPLATE = "generation_config", "prompt_template"
TEXT_KEYS = {f"{GENERATION}.{TEMPLATE}", "ckpt_path"}  # never parsed as YAML
OWN_KEYS = {"engine", GENERATION, "benchmarks", "run_only"}


class GenerationSettings(BaseModel):
    """The keys of a `generation_config`; None leaves the engine its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: PositiveInt | None = None  # an upper bound
    max_context: PositiveInt | None = None
    max_tokens: NonNegativeInt | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    condition: str | None = None  # several joined by commas
    stop: str | list[str] | None = None
    prompt_template: str | None = None


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """One benchmark to run."""

    label: str  # its name, with what sets it apart where the name comes twice
    benchmark: Benchmark
    generation: dict[str, Any]  # merged; as written, without the template
    prompt_template: str | None = None

    def prompt_of(self, prompt: str) -> str:
        """The prompt within its template."""
        return (
            prompt if self.prompt_template is None else self.prompt_template.format(prompt=prompt)
        )


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """A whole evaluation, checked."""

    engine: str
    plans: list[BenchmarkPlan]
    engine_settings: dict[str, Any]  # all other top-level keys, `ckpt_path` among them
    notes: tuple[str, ...] = field(default=())
    is_whole_file: bool = True  # nothing was chosen of it by run_only

    def groups(self) -> list[list[BenchmarkPlan]]:
        """The plans by equal settings and template, in order of first appearance."""
        groups: dict[str, list[BenchmarkPlan]] = {}
        for plan in self.plans:
            key = json.dumps([plan.generation, plan.prompt_template], sort_keys=True)
            groups.setdefault(key, []).append(plan)
        return list(groups.values())


def read_settings(
    config_text: str, arguments: Sequence[str], *, engines: Collection[str]
) -> EvaluationSettings:
    """The settings of a file's text and a command line. ValueError names what is wrong."""
    try:
        config = parse_yaml(config_text) or {}
    except ValueError as error:
        raise ValueError(f"the evaluation's config is no YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("the evaluation's config must be keys with values")
    for argument in arguments:
        _set(config, argument)
    _require_engine(config, engines)
    entries, notes = _entries(config)
    common = _mapping(config.get(GENERATION), GENERATION)
    plans = [_plan(common, entry) for entry in entries]
    engine_settings = {key: value for key, value in config.items() if key not in OWN_KEYS}
    is_whole_file = config.get("run_only") is None
    plans = _told_apart(plans)
    return EvaluationSettings(config["engine"], plans, engine_settings, notes, is_whole_file)


def _set(config: dict[str, Any], argument: str) -> None:
    key, separator, text = argument.partition("=")
    if not separator:
        raise ValueError(f"{argument!r} is no setting; settings are written key=value")
    head, _, below = key.partition(".")
    if (below and (head != GENERATION or "." in below)) or not head:
        raise ValueError(
            f"unknown setting {key!r}; a benchmark's own settings stand in the file, or in "
            "benchmarks=[{name: NAME, num_shots: 1}]"
        )
    value: Any = text
    if key not in TEXT_KEYS or text == "null":
        try:
            value = parse_yaml(text)
        except ValueError:
            raise ValueError(f"{key}={text!r} is no YAML value; quote it") from None
    if not below:
        config[head] = value
    else:
        config[head] = {**_mapping(config.get(head), head), below: value}


def _require_engine(config: Mapping[str, Any], engines: Collection[str]) -> None:
    engine = config.get("engine")
    if engine not in engines:
        hint = _nearest(str(engine), engines) if engine else f"one of {', '.join(sorted(engines))}"
        raise ValueError(f"engine={engine} is no engine; {hint}")


def _entries(config: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], tuple[str, ...]]:
    """The entries to run, and notes on those that only the command line names."""
    entries = config.get("benchmarks")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("benchmarks must be a list of entries such as {name: MATH}")
    for entry in entries:
        benchmark_named(str(entry.get("name")))
    wanted = _wanted(config)
    if wanted is None:
        if not entries:
            raise ValueError("benchmarks is empty: nothing to run")
        return entries, ()
    listed = [entry["name"] for entry in entries]
    added = [name for name in wanted if name not in listed]
    chosen = [entry for entry in entries if entry["name"] in wanted]
    notes = tuple(f"{name} is not in the config; its default settings are used" for name in added)
    return [*chosen, *({"name": name} for name in added)], notes


def _wanted(config: Mapping[str, Any]) -> list[str] | None:
    """The names of run_only; None: all of the file."""
    if config.get("run_only") is None:
        return None
    names = config["run_only"]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names:
        raise ValueError(f"run_only={names} names no benchmark; write run_only=[MATH,DROP]")
    for name in names:
        benchmark_named(str(name))
    return list(dict.fromkeys(names))


def _plan(common: Mapping[str, Any], entry: Mapping[str, Any]) -> BenchmarkPlan:
    name = entry["name"]
    kind = BENCHMARKS[name]
    own = {key: value for key, value in entry.items() if key not in ("name", GENERATION)}
    try:
        benchmark = kind.model_validate(own)
    except ValidationError as error:
        raise ValueError(f"{name}: {_reasons(error, kind)}") from None
    special = _mapping(entry.get(GENERATION), f"{name}.{GENERATION}")
    merged = {**common, **kind.generation, **special}
    try:
        GenerationSettings.model_validate(merged)
    except ValidationError as error:
        raise ValueError(f"{name}: {GENERATION}.{_reasons(error, GenerationSettings)}") from None
    template = merged.pop(TEMPLATE, None)
    if template is not None:
        require_template(template)
    return BenchmarkPlan(name, benchmark, merged, template)


def require_template(template: str) -> None:
    """ValueError where the text is no template of a prompt."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        filled = set(fields) == {"prompt"} and "p" in template.format(prompt="p")
    except (ValueError, LookupError, AttributeError):
        filled = False
    if not filled:
        raise ValueError(
            f"{TEMPLATE}={template!r} must hold {{prompt}} and no other field; a brace that is "
            "meant as text is written twice"
        )


def _told_apart(plans: list[BenchmarkPlan]) -> list[BenchmarkPlan]:
    """A benchmark listed twice is kept twice, labelled by what differs, else by a number."""
    labels: list[str] = []
    for plan in plans:
        twins = [each for each in plans if each.label == plan.label]
        differing = _differences(plan, twins)
        labels.append(f"{plan.label}({differing})" if differing else plan.label)
    numbered = [
        f"{label}#{labels[:at].count(label) + 1}" if labels.count(label) > 1 else label
        for at, label in enumerate(labels)
    ]
    return [replace(plan, label=label) for plan, label in zip(plans, numbered, strict=True)]


def _differences(plan: BenchmarkPlan, twins: Sequence[BenchmarkPlan]) -> str:
    settings = [_flat(twin) for twin in twins]
    own = _flat(plan)
    keys = dict.fromkeys(key for each in settings for key in each)
    varying = [key for key in keys if any(each.get(key) != own.get(key) for each in settings)]
    return ",".join(f"{key}={own.get(key)}" for key in varying)


def _flat(plan: BenchmarkPlan) -> dict[str, Any]:
    template = {} if plan.prompt_template is None else {TEMPLATE: plan.prompt_template}
    return {**plan.benchmark.model_dump(), **plan.generation, **template}


def require_conditions(settings: EvaluationSettings, known: Collection[str]) -> None:
    """ValueError where a condition is none that the tokenizer has a token for."""
    for plan in settings.plans:
        condition = plan.generation.get("condition") or ""
        for name in filter(None, (part.strip() for part in condition.split(","))):
            if name not in known:
                raise ValueError(
                    f"{plan.label}: condition={condition} names {name}, which the checkpoint does "
                    f"not know; {_nearest(name, known)}"
                )


def config_path(name: str) -> Path:
    """A config of this package by its name (`hrm_benchmarking`)."""
    return Path(__file__).parent / "config" / f"{name}.yaml"


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}={value!r} must be keys with values")
    return value


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"


def _reasons(error: ValidationError, record: type[BaseModel]) -> str:
    """One line of all that is wrong, by key."""
    reasons = []
    for each in error.errors():
        key = ".".join(map(str, each["loc"]))
        if each["type"] == "extra_forbidden":
            reasons.append(f"{key} is no setting; {_nearest(key, record.model_fields)}")
        else:
            reasons.append(f"{key}={each['input']!r}: {each['msg']}")
    return "; ".join(reasons)
