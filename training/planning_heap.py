"""What a process on a CPU has in memory at most, where torch allocates through glibc's malloc.

A large block has pages of its own, and gives them back. All others share a heap that keeps the
extent which it once had, and that loses some of it between the blocks of activations. So what is
resident is more than what is allocated at any time. Measured by scripts/benchmark_planner.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.planning_activations import FLOAT_BYTES, share_in_blocks_above
from training.planning_memory import MemoryCase, Moment, parameters

MAPPED_FROM = 32 << 20  # bytes: the most that glibc's limit for large blocks grows to
HEAP_LOSS = 0.12  # of activations
LOADED_BYTES = 45 << 20  # code and buffers of kernels that a first step loads


def resident_bytes(case: MemoryCase, moments: Sequence[Moment]) -> int:
    """Of a step, beside what the process has before."""
    mapped = [_mapped_bytes(case, moment) for moment in moments]
    heap = max(
        moment.total - own_pages + round(HEAP_LOSS * moment.parts["activations"])
        for moment, own_pages in zip(moments, mapped, strict=True)
    )
    return heap + max(mapped) + LOADED_BYTES


def _mapped_bytes(case: MemoryCase, moment: Moment) -> int:
    """Bytes in large blocks, by the shapes of what the parts consist of."""
    parts, size = moment.parts, case.kernels.element_bytes
    weights = _share_of_large_weights(case, FLOAT_BYTES)
    shares: dict[str, float] = {}
    shares |= dict.fromkeys(("weights", "moments", "averages", "gradients", "update"), weights)
    shares["compute copy"] = _share_of_large_weights(case, size)
    if case.is_wrapped and case.num_micro == 1:
        shares["gradients"] = shares["compute copy"]
    of_stacks = [
        share_in_blocks_above(MAPPED_FROM, stack, case.rows, case.kernels)
        for stack in case.config.stacks().values()
    ]
    shares["activations"] = sum(of_stacks) / len(of_stacks)
    table = FLOAT_BYTES * case.vocab_size * case.config.hidden_size
    shares["loss"] = float(table > MAPPED_FROM)
    shares["FSDP buffers"] = float(parts["FSDP buffers"] > MAPPED_FROM)
    return round(sum(parts[part] * share for part, share in shares.items()))


def _share_of_large_weights(case: MemoryCase, size: int) -> float:
    local = [n // case.shards for _, n in parameters(case.config, case.vocab_size)]
    return sum(n for n in local if n * size > MAPPED_FROM) / sum(local)
