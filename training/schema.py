"""The record of a training run: every legal key, its type and its rule; nothing else is legal."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from models import ArchConfig
from models.lora import LoraConfig
from models.transformer import StackConfig

# Project and run are folder names: nothing that leads out of checkpoints/.
FolderName = Annotated[str, Field(strict=False, coerce_numbers_to_str=True, pattern=r"^\w[^/\\]*$")]
Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True, min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]


class DataConfig(BaseModel):
    """Where the sampled data lies and what of it is scored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    path: Name
    target_only: bool = True  # False: the instruction is scored too


class ValDataConfig(BaseModel):
    """Held-out data, and how often a run is scored on it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    path: Name  # a folder of sampled data; its first epoch is used, once
    interval: PositiveInt = 500  # steps; also at the end of the run
    max_examples: PositiveInt | None = None  # the first ones alone; None: all of them
    num_samples: NonNegativeInt = 4  # prompts answered and written to samples.jsonl each time
    max_new_tokens: PositiveInt = 64  # of such an answer
    keep_best: bool = False  # the checkpoint of the lowest loss, as fsdp2_best
    patience: PositiveInt | None = None  # stop after so many scores in a row that are not lower


class BenchmarksConfig(BaseModel):
    """Benchmarks that a run is asked while it trains, and how often."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    run_only: Annotated[list[Name], Field(min_length=1)]  # their names
    interval: PositiveInt | None = None  # steps; also at the end of the run
    epochs: PositiveInt | None = None  # or epochs; neither: at the end alone
    data_dir: Name | None = None  # mirror of the data sets; None: the hub, or its cache
    limit: PositiveInt | None = None  # items of each; None: all of them
    batch_size: PositiveInt = 64  # answers made at a time on each rank, at most
    config: Name = "hrm_benchmarking"  # how they are asked, as for evaluation.main

    @field_validator("run_only", mode="before")
    @classmethod
    def _one_or_several(cls, names: object) -> object:
        return [names] if isinstance(names, str) else names


class GuardConfig(BaseModel):
    """What follows on a step that would harm the weights, and what counts as one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    policy: Literal["stop", "skip", "rewind"] = "stop"
    spike_score: PositiveFloat | None = None  # robust z-score of a loss; None: none is a spike
    window: NonNegativeInt = 10  # rewind: steps before and after the bad one, passed over too
    limit: PositiveInt = 10  # bad steps of a run; at the next one it stops


class RunConfig(BaseModel):
    """One training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    arch: ArchConfig
    data: DataConfig
    val_data: ValDataConfig | None = None
    benchmarks: BenchmarksConfig | None = None
    guard: GuardConfig = GuardConfig()
    global_batch_size: PositiveInt  # tokens over all ranks, padding included
    micro_batch_size: PositiveInt | None = None  # tokens of a rank that are computed at a time
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

    project_name: FolderName | None = None
    run_name: FolderName | None = None
    checkpoint_path: Name | None = None
    new_run: bool = False  # start another run even where one could be continued
    allow_other_data: bool = False  # continue a run on other data than it began with
    resume_from: Name | None = None  # start from the weights of this run
    resume_epoch: PositiveInt | None = None  # ... after this epoch; None: its newest checkpoint
    resume_best: bool = False  # ... those of its lowest held-out loss
    weights_only_resume_from_ema: bool = False
    freeze: list[Name] | None = None  # weights that stay as they are: names, or parts of them
    lora: LoraConfig | None = None  # train adapters of all weights alone

    checkpoint_interval: PositiveInt = 1  # epochs
    checkpoint_steps: PositiveInt | None = None  # also every so many steps
    checkpoint_start: bool = False  # also the untrained weights, as fsdp2_step_0
    checkpoint_minutes: PositiveFloat | None = None  # also every so many minutes
    keep_last: PositiveInt | None = None  # step checkpoints kept; None: all of them
    save: Literal["auto", "plain", "background"] = "auto"  # whether training waits for the disk
    max_steps: PositiveInt | None = None  # stop, saved, after this step
    max_minutes: PositiveFloat | None = None  # stop, saved, after so many minutes
    hang_minutes: Minutes | None = 30.0  # that several ranks may stand still; None: for ever
    log_interval: PositiveInt = 5  # steps
    log_recurrence: bool = False  # norms by level, of gradients, updates and states
    tracker: Literal["auto", "none", "wandb", "tensorboard", "trackio"] = "auto"
    dry_run: bool = False  # two steps on the longest rows, save, load, and leave
    plan: bool = False  # tell memory, speed and days, and leave

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    attention: Literal["auto", "flash3", "varlen", "flex", "triton", "sdpa", "dense"] = "auto"
    linear: Literal["auto", "mkl", "onednn"] = "auto"  # kernel of fp32 products on CPU
    num_threads: PositiveInt | None = None  # CPU threads of each process; None: see set_threads
    data_workers: Literal[0, 1] = 1  # processes that make batches ahead
    compile: Literal["none", "block", "stack", "step"] = "none"  # what torch.compile takes whole
    activation_checkpointing: Literal["none", "block", "attention"] = "none"  # computed twice
    offload_optimizer: bool = False  # moments and averages lie in host memory between steps
    fsdp_replicas: PositiveInt = 1  # groups of ranks, each with all weights in shards (HSDP)
    deterministic: bool = False  # bit-equal reruns on CUDA too, at some speed

    @model_validator(mode="after")
    def _check_start(self) -> RunConfig:
        given = (self.resume_epoch, self.resume_best, self.weights_only_resume_from_ema)
        if self.resume_from is None and any(given):
            raise ValueError(
                "resume_epoch, resume_best and weights_only_resume_from_ema say what to take from "
                "the run in resume_from, which is not given; give it or leave them out"
            )
        if self.resume_epoch and self.resume_best:
            raise ValueError(
                f"resume_epoch={self.resume_epoch} and resume_best=true name two checkpoints; give "
                "one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> RunConfig:
        if self.lora and self.resume_from is None:
            raise ValueError(
                "lora trains adapters of weights that stay as they are, and without resume_from "
                "they are random; give the run whose weights they are"
            )
        if self.lora and self.freeze:
            raise ValueError(
                f"freeze={self.freeze}: with lora nothing but adapters is trained; leave it out"
            )
        if self.lora and self.lora.per_cycle and self.compile != "none":
            raise ValueError(
                f"compile={self.compile}: with lora.per_cycle=true each call of a block computes "
                "something else and would be compiled by itself; use compile=none"
            )
        return self


# Settings that change where, how fast and how long a run computes, not what.
MACHINE_KEYS = (
    "device",
    "attention",
    "linear",
    "num_threads",
    "data_workers",
    "hang_minutes",
    "log_interval",
    "new_run",
    "allow_other_data",
    "val_data",
    "benchmarks",
    "log_recurrence",
    "tracker",
    "dry_run",
    "plan",
    "compile",
    "activation_checkpointing",
    "offload_optimizer",
    "fsdp_replicas",
    "deterministic",
    "micro_batch_size",
    "checkpoint_interval",
    "checkpoint_steps",
    "checkpoint_start",
    "checkpoint_minutes",
    "keep_last",
    "save",
    "max_steps",
    "max_minutes",
    "guard",  # what it does is told as it does it, and kept in guard.jsonl
)
NAME_KEYS = ("project_name", "run_name", "checkpoint_path")
SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "val_data": ValDataConfig,
    "benchmarks": BenchmarksConfig,
    "guard": GuardConfig,
    "lora": LoraConfig,
}
GROUPS = ("arch/net@arch", "arch/size@arch", "data")  # keys that choose a file of config/


def legal_keys() -> list[str]:
    """All keys, dotted, that a configuration may have."""
    keys = []
    for name in RunConfig.model_fields:
        if name == "arch":
            of_nets = {key for net in nets() for key in net.model_fields}
            keys += [f"arch.{key}" for key in sorted(of_nets | {"head"})]
            keys += [f"arch.H_override.{key}" for key in StackConfig.model_fields]
        elif name in SECTIONS:
            keys += [f"{name}.{key}" for key in SECTIONS[name].model_fields]
        else:
            keys.append(name)
    return keys


def nets() -> tuple[type[BaseModel], ...]:
    """The records of all nets."""
    return get_args(get_args(ArchConfig)[0])


def tags(net: type[BaseModel]) -> tuple[str, ...]:
    """The values of arch.name that a record serves."""
    return get_args(net.model_fields["name"].annotation)


def net_names() -> list[str]:
    """All values of arch.name."""
    return [name for net in nets() for name in tags(net)]
