"""What a process on a CPU has in memory at most, where torch allocates through glibc's malloc.

A large block has pages of its own, and gives them back. All others share a heap that keeps the
extent which it once had. There the parts of a step hardly use one another's room, since they are
made while others are there; what the update takes is the exception: by then activations and loss
are gone. What a block takes in passing has two places: that of the forward pass, and one behind all
that the forward pass kept. Held against processes by scripts/benchmark_planner.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.planning_activations import FLOAT_BYTES, kept_tensors, share_in_blocks_above
from training.planning_memory import MemoryCase, Moment, extents, parameters

MAPPED_FROM = 32 << 20  # bytes: the most that glibc's limit for large blocks grows to
LOADED_BYTES = 45 << 20  # code and buffers of kernels that a first step loads
PASSING = ("activations", "loss", "update")  # the others stay from one micro-batch to the next


def resident_bytes(case: MemoryCase, moments: Sequence[Moment]) -> int:
    """Of a step, beside what the process has before."""
    large = _large_shares(case, moments)
    mapped = max(_mapped_bytes(case, moment, large) for moment in moments)
    return _heap_bytes(case, large) + mapped + LOADED_BYTES


def _heap_bytes(case: MemoryCase, large: dict[str, float]) -> int:
    """Of all blocks that are not large."""
    room = extents(case)

    def small(part: str, size: int) -> float:
        return size * (1 - large[part])

    standing = sum(small(part, each.lasting) for part, each in room.items() if part not in PASSING)
    activations, loss = room["activations"], room["loss"]
    of_gradients = small("activations", activations.lasting + 2 * activations.passing)
    of_gradients += small("loss", max(loss.lasting, loss.passing)) + _hole_bytes(case)
    return round(standing + max(of_gradients, small("update", room["update"].passing)))


def _hole_bytes(case: MemoryCase) -> int:
    """Where blocks are computed again, what each keeps lies among what passed, and splits it.

    Half as many holes as blocks (Knuth's fifty-percent rule), each as large as the largest tensor
    that passes may leave it. Which ones are filled is chance: the extent differs from step to step.
    """
    if case.kernels.recomputed == "none":
        return 0
    stacks, holes = case.config.stacks(), 0
    for stack in (stacks[each.stack] for each in case.config.applications() if each.keeps_gradient):
        attention, mlp = kept_tensors(stack, case.rows, case.kernels)
        passing = attention if case.kernels.recomputed == "attention" else attention + mlp
        holes += stack.n_layers * max(each for each in (0, *passing) if each <= MAPPED_FROM) // 2
    return holes


def _mapped_bytes(case: MemoryCase, moment: Moment, large: dict[str, float]) -> int:
    """Of large blocks."""
    if case.is_wrapped and moment.name in ("reduction", "update"):
        # What FSDP has summed of a group is one block, of which gradients are views.
        large = large | {"gradients": float(moment.parts["gradients"] > MAPPED_FROM)}
    return round(sum(moment.parts[part] * share for part, share in large.items()))


def _large_shares(case: MemoryCase, moments: Sequence[Moment]) -> dict[str, float]:
    """The share of each part that is in large blocks, by the shapes of what it consists of."""
    weights = _share_of_large_weights(case, FLOAT_BYTES)
    of_stacks = [
        share_in_blocks_above(MAPPED_FROM, stack, case.rows, case.kernels)
        for stack in case.config.stacks().values()
    ]
    table = FLOAT_BYTES * case.vocab_size * case.config.hidden_size
    buffers = max(moment.parts["FSDP buffers"] for moment in moments)
    return {
        "weights": weights,
        "compute copy": _share_of_large_weights(case, case.kernels.element_bytes),
        "gradients": weights,
        "moments": weights,
        "averages": weights,
        "activations": sum(of_stacks) / len(of_stacks),
        "loss": float(table > MAPPED_FROM),
        "FSDP buffers": float(buffers > MAPPED_FROM),
        "update": weights,
    }


def _share_of_large_weights(case: MemoryCase, size: int) -> float:
    local = [n // case.shards for _, n in parameters(case.config, case.vocab_size)]
    return sum(n for n in local if n * size > MAPPED_FROM) / sum(local)
