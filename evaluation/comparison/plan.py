"""What is compared, and how long each net trains so that the comparison is fair.

Owns entries (a net with settings of its own) and their numbers of steps. Starts nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_io.row_planning import RowPacking, plan_epochs
from data_io.sampled_format import SampledData
from models.flops import core_parameters, training_flops_per_token
from models.transformer import NetConfig
from training.command_line import checked_overrides, parse_config
from training.schedule import backprop_steps_at
from training.schema import RunConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
Match = Literal["flops", "tokens", "parameters"]
MAX_LAYERS = 64  # tried for match=parameters
# What the comparison itself decides, run by run.
OWN_KEYS = {
    *("seed", "lr", "epochs", "schedule_steps", "max_steps", "data_workers"),
    *("checkpoint_path", "checkpoint_interval", "checkpoint_steps", "checkpoint_start"),
    *("project_name", "run_name", "keep_last", "resume_from", "new_run", "arch/net@arch"),
}
Settings = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: a net, and what is set for it alone."""

    net: str
    settings: Settings

    @property
    def label(self) -> str:
        short = (f"{key.removeprefix('arch.')}={value}" for key, value in self.settings.items())
        return " ".join((self.net, *short))

    @property
    def without_lr(self) -> Entry:
        return Entry(self.net, {k: v for k, v in self.settings.items() if k != "lr"})


@dataclass(frozen=True, slots=True)
class Workload:
    """What the data make of a step."""

    vocab_size: int
    tokens_per_step: float  # without padding
    mean_keys: float
    steps_by_epoch: tuple[int, ...]

    def epochs_for(self, steps: int) -> int:
        """Prepared epochs that so many steps need; ValueError where there are too few."""
        total = 0
        for number, in_epoch in enumerate(self.steps_by_epoch, start=1):
            total += in_epoch
            if total >= steps:
                return number
        raise ValueError(
            f"{steps:,} steps are needed, but the {len(self.steps_by_epoch)} prepared epochs make "
            f"{total:,}; make the data with epochs={-(-len(self.steps_by_epoch) * steps // total)} "
            "or more, or compare over fewer steps"
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """An entry with its resolved settings and its budget."""

    entry: Entry
    arch: NetConfig
    settings: Settings  # all that is set for it on the command line of a run
    fixed_lr: float | None  # set by the entry: nothing to tune
    workload: Workload
    steps: int

    @property
    def epochs(self) -> int:
        return self.workload.epochs_for(self.steps)

    def flops_at(self, step: int) -> float:
        """Training FLOPs after that step of this run."""
        return training_flops(self.arch, self.workload, step, self.steps)


def parse_settings(texts: list[str]) -> dict[str, str]:
    """key=value by key; ValueError for what is no setting of pretrain.py, or not free here."""
    checked_overrides(texts, CONFIG_DIR)
    settings = dict(text.split("=", 1) for text in texts)
    taken = OWN_KEYS & settings.keys()
    if taken:
        raise ValueError(
            f"{', '.join(sorted(taken))} cannot be set here: the comparison sets it for each run "
            "(see nets, seeds, lrs and steps)"
        )
    return settings


def parse_entries(text: str) -> list[Entry]:
    """`hrm,transformer:arch.n_layers=2:lr=4e-3`: nets by commas, settings by colons."""
    entries = []
    for part in text.split(","):
        net, *settings = part.split(":")
        checked_overrides([f"arch/net@arch={net}"], CONFIG_DIR)
        lrs = [setting for setting in settings if setting.startswith("lr=")]
        others = parse_settings([setting for setting in settings if setting not in lrs])
        entries.append(Entry(net, {**others, **dict(setting.split("=") for setting in lrs)}))
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"nets={text} names an entry twice; each is compared once")
    return entries


def workload_of(config: RunConfig) -> Workload:
    """Steps, tokens and attention of a run on its data, from the packing itself."""
    data = SampledData.open(config.data.path)
    packing = RowPacking.of_training(
        config.global_batch_size,
        1,
        target_only=config.data.target_only,
        micro=config.micro_batch_size,
    )
    plan = plan_epochs(data, packing, data.num_epochs)
    return Workload(
        vocab_size=data.metadata.padded_vocab_size,
        tokens_per_step=config.global_batch_size * (1 - plan.padding_share),
        mean_keys=plan.mean_keys,
        steps_by_epoch=plan.steps,
    )


def plan_all(
    entries: list[Entry],
    common: Settings,
    *,
    match: Match,
    steps: int,
    compose: Callable[[Settings], dict[str, Any]],
) -> list[Planned]:
    """The first entry makes `steps` steps; the others as many as `match` gives them.

    `compose` gives the configuration that pretrain.py makes of settings.
    """
    planned: list[Planned] = []
    for entry in entries:
        own = entry.without_lr.settings
        settings = {"arch/net@arch": entry.net, **common, **own}
        config, _ = parse_config(compose({**settings, **entry.settings}))
        workload, arch = workload_of(config), config.arch
        first = planned[0] if planned else None
        entry_steps = steps
        if match == "parameters" and first:
            if "arch.n_layers" in own:
                raise ValueError(
                    f"{entry.label}: match=parameters chooses arch.n_layers itself; leave it out, "
                    "or use match=tokens"
                )
            arch = with_parameters(arch, core_parameters(first.arch))
            settings["arch.n_layers"] = str(arch.n_layers)
        if match == "flops" and first:
            entry_steps = steps_within(first.flops_at(first.steps), arch, workload)
        fixed_lr = config.lr if "lr" in entry.settings else None
        planned.append(Planned(entry, arch, settings, fixed_lr, workload, entry_steps))
        workload.epochs_for(entry_steps)
    return planned


def training_flops(arch: NetConfig, workload: Workload, step: int, total_steps: int) -> float:
    """FLOPs of the first `step` steps of a run of `total_steps`, its bp schedule included."""
    reaches: dict[int | None, int] = {}
    for number in range(1, step + 1):
        reach = backprop_steps_at(number, total_steps, arch)
        reaches[reach] = reaches.get(reach, 0) + 1
    return workload.tokens_per_step * sum(
        count
        * training_flops_per_token(
            arch, workload.vocab_size, backprop_steps=reach, mean_keys=workload.mean_keys
        )
        for reach, count in reaches.items()
    )


def steps_within(flops: float, arch: NetConfig, workload: Workload) -> int:
    """The largest number of steps whose whole run costs at most `flops`, and at least one."""
    low, high = 1, 2
    while training_flops(arch, workload, high, high) <= flops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = training_flops(arch, workload, middle, middle) <= flops
        low, high = (middle, high) if fits else (low, middle)
    return low


def with_parameters(arch: NetConfig, wanted: int) -> NetConfig:
    """The net with the number of layers that brings its stacks nearest to `wanted` weights."""
    step = 2 if arch.half_layers else 1
    settings = arch.model_dump()
    candidates = [
        type(arch).model_validate({**settings, "n_layers": layers})
        for layers in range(step, MAX_LAYERS + 1, step)
    ]
    return min(candidates, key=lambda each: abs(core_parameters(each) - wanted))


def run_name(planned: Planned, lr: float, seed: int) -> str:
    """A folder name that says what runs, and differs where any setting does."""
    whole = {**planned.settings, "lr": lr, "seed": seed, "steps": planned.steps}
    digest = hashlib.sha256(repr(sorted(whole.items(), key=str)).encode()).hexdigest()[:8]
    words = planned.entry.without_lr.label.replace("=", "-").replace("/", "-").split(" ")
    return "_".join((*words, f"lr-{lr:g}", f"seed-{seed}", digest))
