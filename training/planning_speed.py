"""How long a step takes, and what of it is spent on sending weights and gradients.

Arithmetic, not measurement: useful FLOPs over what a device is assumed to reach, bytes over what
links are assumed to reach. docs/scaling.md derives the formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from models.flops import core_parameters, total_parameters, training_flops_per_token
from models.transformer import NetConfig
from training.planning_devices import Device
from training.schedule import backprop_steps_at

GATHERED_BYTES, REDUCED_BYTES = 2, 4  # of a weight: bf16 copies are gathered, fp32 sums reduced
LINK_SHARE = 0.8  # of a link's rate that collectives reach
HOP_S = {"node": 2e-6, "network": 6e-6}  # that a ring takes for each rank, at the least
HOST_GB_S = 20.0  # between a GPU and page-locked memory, each way
SCHEDULE_POINTS = 200


@dataclass(frozen=True, slots=True)
class Fleet:
    """Devices, how they are connected, and in how many groups they hold the weights."""

    device: Device
    size: int
    per_node: int = 8
    network_gb_s: float = 50.0  # of each device to other nodes, each way: 400 Gb/s
    replicas: int = 1

    @property
    def shards(self) -> int:
        return self.size // self.replicas

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.per_node)

    def collective_s(self, num_bytes: float, ranks: int, groups_per_node: float) -> float:
        """Seconds of a ring in which each rank ends with, or begins with, `num_bytes`.

        `groups_per_node`: rings of the same kind that share a node's links to the others.
        """
        if ranks == 1:
            return 0.0
        in_node = ranks * groups_per_node <= self.per_node
        # Within a node all links of a ring are its own; out of it, its ranks there share theirs.
        ranks_in_node = max(1.0, self.per_node / groups_per_node)
        rate = self.device.link_gb_s
        if not in_node:
            rate = min(rate, self.network_gb_s * ranks_in_node)
        hop_s = HOP_S["node" if in_node else "network"]
        sent = num_bytes * (ranks - 1) / ranks
        return sent / (rate * LINK_SHARE * 1e9) + (ranks - 1) * hop_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """Seconds that one step sends, and how much of it computing can hide."""

    gather_s: float  # all weights, once a step
    reduce_s: float  # all gradients
    gather_window_s: float  # computing that goes on meanwhile
    reduce_window_s: float

    @property
    def exposed_s(self) -> float:
        hidden = ((self.gather_s, self.gather_window_s), (self.reduce_s, self.reduce_window_s))
        return sum(max(0.0, sent - window) for sent, window in hidden)


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the whole run, on average over its schedule of gradient-carrying calls."""

    flops_per_token: float
    compute_s: float  # of a step
    offload_s: float
    traffic: Traffic
    step_s: float
    tokens_per_s: float  # of all devices


def mean_flops(config: NetConfig, vocab_size: int, mean_keys: float) -> float:
    """Useful FLOPs of a token, on average over a run."""
    found = []
    for point in range(1, SCHEDULE_POINTS + 1):
        steps = backprop_steps_at(point, SCHEDULE_POINTS, config)
        found.append(
            training_flops_per_token(config, vocab_size, backprop_steps=steps, mean_keys=mean_keys)
        )
    return sum(found) / len(found)


def recomputed_share(config: NetConfig, recomputed: str) -> float:
    """FLOPs that activation checkpointing adds, as a share of all weights' useful ones."""
    if recomputed == "none":
        return 0.0
    again, useful = 0.0, 0.0
    for application in config.applications():
        stack = config.stacks()[application.stack]
        weights = stack.num_parameters
        attention = 5 * stack.n_layers * stack.hidden_size**2
        useful += weights * (3 if application.keeps_gradient else 1)
        if application.keeps_gradient:
            again += weights if recomputed == "block" else attention
    return again / useful


def traffic(
    fleet: Fleet, config: NetConfig, vocab_size: int, compute_s: float, num_micro: int
) -> Traffic:
    """One gather of bf16 weights, and the reductions of fp32 gradients, block by block."""
    weights = total_parameters(config, vocab_size)
    num_groups = sum(stack.n_layers for stack in config.stacks().values()) + 1
    shards, replicas = fleet.shards, fleet.replicas
    per_node = max(1.0, fleet.per_node / shards)  # groups of shards
    each = weights / num_groups
    gather_s = fleet.collective_s(GATHERED_BYTES * each, shards, per_node)
    reduce_s = fleet.collective_s(REDUCED_BYTES * each, shards, per_node)
    if replicas > 1:  # an all-reduce is a reduction and a gathering of what each shard has
        own = REDUCED_BYTES * each / shards
        reduce_s += 2 * fleet.collective_s(own, replicas, float(min(shards, fleet.per_node)))
    window_s = _first_calls_share(config) * compute_s / num_micro
    return Traffic(
        num_groups * gather_s,
        (num_groups + _reduced_again(config, num_micro)) * reduce_s,
        window_s,
        2 * window_s,  # a backward pass takes twice as long
    )


def _first_calls_share(config: NetConfig) -> float:
    """Of a step's computing, the first call of each stack: it gathers what later ones use."""
    stacks = config.stacks()
    useful = sum(
        stacks[each.stack].num_parameters * (3 if each.keeps_gradient else 1)
        for each in config.applications()
    )
    return core_parameters(config) / useful


def _reduced_again(config: NetConfig, num_micro: int) -> int:
    """Groups whose gradient is reduced twice: that of earlier micro-batches goes with the first
    of several calls (scripts/count_collectives.py counts it)."""
    if num_micro == 1:
        return 0
    calls = Counter(each.stack for each in config.applications() if each.keeps_gradient)
    return sum(config.stacks()[name].n_layers for name, count in calls.items() if count > 1)


def speed(
    fleet: Fleet,
    config: NetConfig,
    vocab_size: int,
    *,
    batch_tokens: int,
    num_micro: int,
    mean_keys: float,
    mfu: float,
    recomputed: str,
    offloaded_bytes: int,
) -> Speed:
    """Of steps of `batch_tokens` on all devices."""
    flops = mean_flops(config, vocab_size, mean_keys)
    added = 1 + recomputed_share(config, recomputed)
    per_device = batch_tokens / fleet.size
    compute_s = per_device * flops * added / (fleet.device.tflops * 1e12 * mfu)
    offload_s = 2 * offloaded_bytes / (HOST_GB_S * 1e9)
    sent = traffic(fleet, config, vocab_size, compute_s, num_micro)
    step_s = compute_s + offload_s + sent.exposed_s
    return Speed(flops, compute_s, offload_s, sent, step_s, batch_tokens / step_s)


def nodes_table(
    fleet: Fleet,
    config: NetConfig,
    vocab_size: int,
    *,
    nodes: Sequence[int],
    step_seconds: float,
) -> list[tuple[int, int, Traffic]]:
    """For each number of nodes: one group over all, and one a node; `step_seconds` of computing."""
    found = []
    for count in nodes:
        size = count * fleet.per_node
        for replicas in dict.fromkeys((1, count)):
            grown = Fleet(fleet.device, size, fleet.per_node, fleet.network_gb_s, replicas=replicas)
            sent = traffic(grown, config, vocab_size, step_seconds, num_micro=1)
            found.append((count, replicas, sent))
    return found
