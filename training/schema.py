"""The record of the command line: every legal key, its type and its rule; nothing else is accepted.

Knows nothing of Hydra. Unknown keys are refused before a configuration is composed from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from models import ArchConfig
from models.transformer import StackConfig

Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True, min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(BaseModel):
    """Where the sampled data lies and what of it is scored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: Name
    target_only: bool = True  # False: the instruction is scored too


class RunConfig(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    arch: ArchConfig
    data: DataConfig
    global_batch_size: PositiveInt  # tokens over all ranks, padding included
    epochs: PositiveInt
    lr: PositiveFloat
    lr_min_ratio: Annotated[float, Field(ge=0, le=1)]
    lr_warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    beta1: Fraction
    beta2: Fraction
    ema: Fraction | None
    fwd_bwd_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    schedule_steps: Literal["counted", "published"] | PositiveInt = "counted"
    seed: NonNegativeInt = 0

    project_name: Name | None = None
    run_name: Name | None = None
    checkpoint_path: Name | None = None
    new_run: bool = False  # start another run even where one could be continued
    resume_from: Name | None = None  # start from the weights of this run
    resume_epoch: PositiveInt | None = None  # ... after this epoch; None: its newest checkpoint
    weights_only_resume_from_ema: bool = False

    checkpoint_interval: PositiveInt = 1  # epochs
    checkpoint_steps: PositiveInt | None = None  # also every so many steps
    checkpoint_start: bool = False  # also the untrained weights, as fsdp2_step_0
    log_interval: PositiveInt = 5  # steps

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    attention: Literal["auto", "flash3", "varlen", "flex", "sdpa", "dense"] = "auto"
    num_threads: PositiveInt | None = None  # CPU threads of each process; None: see set_threads
    data_workers: Literal[0, 1] = 1  # processes that make batches ahead

    @model_validator(mode="after")
    def _check_start(self) -> RunConfig:
        if self.resume_from is None and (self.resume_epoch or self.weights_only_resume_from_ema):
            raise ValueError(
                "resume_epoch and weights_only_resume_from_ema say what to take from the run in "
                "resume_from, which is not given; give it or leave them out"
            )
        return self


# Settings that change where or how fast a run computes, not what.
MACHINE_KEYS = ("device", "attention", "num_threads", "data_workers", "log_interval", "new_run")
NAME_KEYS = ("project_name", "run_name", "checkpoint_path")


_SCHEDULED_BACKPROP = {"bp_warmup_ratio", "bp_min_steps", "bp_max_steps"}


def parse_config(raw: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The record of a composed configuration, and notes for the user.

    ValueError lists every rule that is broken, with the nearest legal key for an unknown one.
    """
    notes = []
    arch = dict(raw.get("arch") or {})
    if "head" in arch:
        notes.append(f"arch.head={arch.pop('head')} is ignored: there is one head")
    try:
        return RunConfig(**{**raw, "arch": arch}), notes
    except ValidationError as error:
        raise ValueError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """What pydantic found, one line a finding: key, value, rule."""
    lines = []
    for finding in error.errors():
        # The location of a union member begins with the net's name: arch.hrm.lr -> arch.lr.
        path = [str(p) for i, p in enumerate(finding["loc"]) if not (i == 1 and p in _net_names())]
        key = ".".join(path)
        if finding["type"] == "extra_forbidden":
            lines.append(unknown_key(key))
        elif finding["type"] == "missing":
            lines.append(f"{key} is required and has no value; give {key}=...")
        elif finding["type"] == "value_error":
            lines.append(f"{key + ': ' if key else ''}{finding.get('ctx', {}).get('error')}")
        elif finding["input"] is None:
            lines.append(f"{key} is not set; give {key}=...")
        else:
            lines.append(f"{key}={finding['input']}: {finding['msg']}")
    return "\n".join(dict.fromkeys(lines))


def unknown_key(key: str, known: Iterable[str] | None = None) -> str:
    """An error text that names the nearest legal key."""
    known = legal_keys() if known is None else list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "see python pretrain.py --help"
    return f"unknown key {key!r}; {hint}"


def legal_keys() -> list[str]:
    """All keys, dotted, that a configuration may have."""
    keys = []
    for name, field in RunConfig.model_fields.items():
        if name == "arch":
            nets = {key for net in _nets() for key in net.model_fields}
            keys += [f"arch.{key}" for key in sorted(nets | {"head"})]
            keys += [f"arch.H_override.{key}" for key in StackConfig.model_fields]
        elif name == "data":
            keys += [f"data.{key}" for key in DataConfig.model_fields]
        else:
            assert field is not None
            keys.append(name)
    return keys


def checked_overrides(arguments: list[str], config_dir: Path) -> list[str]:
    """Command-line arguments with every override checked; ValueError for one that is not legal.

    Legal keys are set whether or not a YAML file mentions them, with or without `+`.
    """
    checked = []
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            takes_value = argument in _FLAGS_WITH_VALUE
            checked.append(argument)
            continue
        checked.append(_checked_override(argument, config_dir))
    return checked


_FLAGS_WITH_VALUE = frozenset(
    [
        *("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"),
        *("--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun"),
    ]
)


def _checked_override(argument: str, config_dir: Path) -> str:
    bare = argument.lstrip("+~")
    key, separator, value = bare.partition("=")
    if not separator and not argument.startswith("~"):
        raise ValueError(f"{argument!r} is no override; write key=value, e.g. lr=3e-4")
    if key.startswith(("hydra.", "hydra/")):
        return argument
    group = key.partition("@")[0]
    if "@" in key or (config_dir / group).is_dir():
        _check_choice(key, group, value, config_dir)
        return argument
    if key not in legal_keys() and key != "arch.H_override":
        raise ValueError(unknown_key(key))
    return argument if argument.startswith("~") else f"++{bare}"


def _check_choice(key: str, group: str, value: str, config_dir: Path) -> None:
    groups = [
        path.relative_to(config_dir).as_posix() for path in config_dir.rglob("*") if path.is_dir()
    ]
    if group not in groups:
        raise ValueError(unknown_key(group, groups))
    options = sorted(p.stem for p in (config_dir / group).glob("*.yaml") if p.stem[0] != "_")
    for choice in value.split(","):
        if choice not in options:
            nearest = difflib.get_close_matches(choice, options, n=1, cutoff=0.3)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise ValueError(f"{key}={choice} does not exist{hint}; it is one of {options}")


def _nets() -> tuple[type[BaseModel], ...]:
    return get_args(get_args(ArchConfig)[0])


def _net_names() -> set[str]:
    return {name for net in _nets() for name in get_args(net.model_fields["name"].annotation)}
