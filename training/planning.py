"""A run planned before it starts: memory by part, the largest micro-batch, speed, days and cost.

Owns what is asked and what follows; the arithmetic is in `planning_memory` and `planning_speed`,
how it is told in `planning_text`. Builds no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import NormalDist, fmean

import numpy as np
import torch

from data_io.sampled_format import SampledData
from training.planning_activations import FLOAT_BYTES, Kernels, Rows
from training.planning_heap import resident_bytes
from training.planning_memory import (
    MemoryCase,
    Moment,
    memory_moments,
    peak,
)
from training.planning_speed import Fleet, Speed, speed
from training.saving import MIN_BYTES
from training.schema import RunConfig

SAMPLED_LENGTHS = 4096  # examples of the data whose lengths stand for all
SPREAD = 0.87  # standard deviation of the logarithm of made-up lengths
USABLE_SHARE = 0.95  # of a device's memory: the rest is lost between the allocator's blocks
MICRO_STEP = 256  # micro-batches are tried in multiples of this
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Examples:
    """What the plan needs to know of the data."""

    lengths: tuple[int, ...]  # in tokens, some of them in no order
    scored_share: float  # of all tokens
    mean_keys: float  # that a token attends to
    source: str  # where this is known from

    @classmethod
    def of_data(cls, data: SampledData, *, target_only: bool) -> Examples:
        """Examples from all over the first epoch."""
        index = data.epoch(0)
        chosen = np.linspace(0, len(index) - 1, min(len(index), SAMPLED_LENGTHS)).astype(np.int64)
        prefix = np.asarray(index.inst_len)[chosen].astype(np.int64)
        causal = np.asarray(index.resp_len)[chosen].astype(np.int64) - 1
        lengths = prefix + causal
        seen = prefix * lengths + causal * (causal + 1) // 2
        scored = (causal + 1).sum() if target_only else lengths.sum()
        return cls(
            lengths=tuple(lengths.tolist()),
            scored_share=min(1.0, float(scored / lengths.sum())),
            mean_keys=float(seen.sum() / lengths.sum()),
            source=f"{data.folder}, mean length {lengths.mean():.0f}",
        )

    @classmethod
    def made_up(cls, mean_length: float, max_length: int, scored_share: float) -> Examples:
        """Lognormal lengths, half of each example an instruction."""
        draw = NormalDist(math.log(mean_length) - SPREAD**2 / 2, SPREAD)
        points = [(number + 0.5) / SAMPLED_LENGTHS for number in range(SAMPLED_LENGTHS)]
        lengths = [min(max_length, max(2, round(math.exp(draw.inv_cdf(p))))) for p in points]
        mixed = np.random.default_rng(0).permutation(lengths).tolist()
        keys = fmean(0.625 * length**2 for length in mixed) / fmean(mixed)
        told = f"made-up lengths, mean {fmean(mixed):.0f}, at most {max_length}"
        return cls(tuple(mixed), scored_share, keys, told)

    def rows(self, tokens: int) -> Rows:
        """A full micro-batch of them."""
        return Rows.of(self.filling(tokens), tokens, round(tokens * self.scored_share))

    def filling(self, tokens: int) -> list[int]:
        """Lengths that fill a row to its end, the last one cut."""
        return list(self._fill(tokens))

    def _fill(self, tokens: int) -> Iterator[int]:
        for length in cycle(self.lengths):
            if length >= tokens:
                yield tokens
                return
            tokens -= length
            yield length


@dataclass(frozen=True, slots=True)
class Plan:
    """What follows for a run on a fleet."""

    config: RunConfig
    fleet: Fleet
    examples: Examples
    case: MemoryCase
    dtype: str
    micro_tokens: int
    moments: list[Moment]
    largest_micro: int | None  # tokens that fit; None: not even the fewest that were tried
    speed: Speed
    total_steps: int
    usable_bytes: int  # of each device

    @property
    def peak(self) -> Moment:
        return peak(self.moments)

    @property
    def peak_bytes(self) -> int:
        """Of the allocator of a GPU; of a process on a CPU, beside what it has before."""
        beside = 0 if self.fleet.device.is_cuda else self.copy_bytes
        return _peak_bytes(self.case, self.moments, self.fleet) + beside

    @property
    def copy_bytes(self) -> int:
        """Of host memory for the copy that a checkpoint is written from while training goes on."""
        weights = FLOAT_BYTES * self.case.num_parameters // self.fleet.shards
        whole = weights + self.case.state_bytes
        is_small = self.config.save == "auto" and whole < MIN_BYTES
        return 0 if self.config.save == "plain" or is_small else whole

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def hours(self) -> float:
        return self.total_steps * self.speed.step_s / 3600

    @property
    def host_bytes(self) -> int:
        """Of what lies in host memory for each GPU: optimizer state, a copy for checkpoints."""
        if not self.fleet.device.is_cuda:
            return 0
        return self.copy_bytes + self.case.state_bytes * self.case.offloads


def make_plan(
    config: RunConfig,
    fleet: Fleet,
    examples: Examples,
    *,
    vocab_size: int,
    total_steps: int,
    mfu: float,
) -> Plan:
    """The plan of a run; ValueError where its batch cannot be shared by the devices."""
    share = _share_of_each(config, fleet)
    micro_tokens = min(config.micro_batch_size or share, share)
    case = _memory_case(config, fleet, examples, vocab_size, micro_tokens)
    usable = int((USABLE_SHARE * fleet.device.memory_gib - fleet.device.context_gib) * GIB)
    return Plan(
        config=config,
        fleet=fleet,
        examples=examples,
        case=case,
        dtype=_dtype(config, fleet),
        micro_tokens=micro_tokens,
        moments=memory_moments(case),
        largest_micro=_largest_micro(config, fleet, examples, vocab_size, usable),
        speed=speed(
            fleet,
            config.arch,
            vocab_size,
            batch_tokens=config.global_batch_size,
            num_micro=case.num_micro,
            mean_keys=examples.mean_keys,
            mfu=mfu,
            recomputed=config.activation_checkpointing,
            offloaded_bytes=case.state_bytes if case.offloads else 0,
        ),
        total_steps=total_steps,
        usable_bytes=usable,
    )


def _share_of_each(config: RunConfig, fleet: Fleet) -> int:
    if fleet.size % fleet.replicas:
        raise ValueError(
            f"fsdp_replicas={fleet.replicas} does not divide the {fleet.size} devices; use a "
            "number that does"
        )
    if config.global_batch_size % fleet.size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not divisible by the {fleet.size} "
            f"devices; use e.g. {-(-config.global_batch_size // fleet.size) * fleet.size}"
        )
    return config.global_batch_size // fleet.size


def _peak_bytes(case: MemoryCase, moments: list[Moment], fleet: Fleet) -> int:
    return peak(moments).total if fleet.device.is_cuda else resident_bytes(case, moments)


def _dtype(config: RunConfig, fleet: Fleet) -> str:
    if config.fwd_bwd_dtype != "auto":
        return config.fwd_bwd_dtype
    return "bfloat16" if fleet.device.is_cuda else "float32"


def _memory_case(
    config: RunConfig, fleet: Fleet, examples: Examples, vocab_size: int, micro_tokens: int
) -> MemoryCase:
    dtype = getattr(torch, _dtype(config, fleet))
    attention = config.attention
    if attention == "auto":
        attention = "varlen" if fleet.device.is_cuda else "sdpa"
    if attention == "dense":
        raise ValueError("attention=dense is for tests, and is not planned; use attention=auto")
    share = config.global_batch_size // fleet.size
    return MemoryCase(
        config=config.arch,
        vocab_size=vocab_size,
        rows=examples.rows(micro_tokens),
        num_micro=-(-share // micro_tokens),
        kernels=Kernels(
            attention,
            dtype.itemsize,
            is_compiled=config.compile != "none",
            recomputed=config.activation_checkpointing,
            on_cpu=not fleet.device.is_cuda,
        ),
        shards=fleet.shards,
        is_wrapped=fleet.size > 1 or dtype != torch.float32,
        has_momentum=config.beta1 > 0,
        has_average=config.ema is not None,
        offloads=config.offload_optimizer and fleet.device.is_cuda,
    )


def _largest_micro(
    config: RunConfig, fleet: Fleet, examples: Examples, vocab_size: int, usable: int
) -> int | None:
    """Tokens of the largest micro-batch that fits, by halving; at most a device's share."""
    share = config.global_batch_size // fleet.size

    def fits(tokens: int) -> bool:
        case = _memory_case(config, fleet, examples, vocab_size, tokens)
        return _peak_bytes(case, memory_moments(case), fleet) <= usable

    if fits(share):
        return share
    low, high = 0, -(-share // MICRO_STEP)  # in steps: fits (or none), does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * MICRO_STEP) else (low, middle)
    return low * MICRO_STEP or None
