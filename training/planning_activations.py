"""What a block keeps for the backward pass, in bytes, counted from its shapes.

Counted as autograd saves it, and held against what it does save by tests/test_planning.py. For
CPU kernels that is exact; what compiled code and CUDA kernels keep follows from the same shapes,
and nobody has measured it on a GPU yet (`gpu_check --only memory_plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.attention.in_place import LONG_FROM
from models.attention.sdpa import ALONE_FROM, COARSE_FROM, COARSE_WIDTH, FINE_WIDTH
from models.transformer import NetConfig, StackConfig

FLOAT_BYTES = 4  # of norms, rotary angles and log-sum-exps, whatever the compute type is
# Calls of the kernel for one attention, each with its own output.
PASSES = {"varlen": 2, "flash3": 2, "flex": 1, "triton": 1}


@dataclass(frozen=True, slots=True)
class Rows:
    """One micro-batch as memory sees it."""

    tokens: int  # T, padding included
    scored: int  # labels that count
    slots: int  # of all buckets of attention=sdpa
    mask_entries: int  # of all masks of these buckets
    sums: int  # for each head, that attention keeps where blocks are written out
    long_mask_entries: int  # of the masks of long examples there

    @classmethod
    def of(cls, lengths: Sequence[int], tokens: int, scored: int) -> Rows:
        """A row of `tokens` with examples of these lengths."""
        widths = [_bucket_width(length) for length in lengths if length]
        long = [length for length in lengths if length >= LONG_FROM]
        return cls(
            tokens,
            scored,
            slots=sum(widths),
            mask_entries=sum(width * width for width in widths),
            sums=2 * tokens * (len(long) < len(lengths)) + sum(long),
            long_mask_entries=sum(length * length // 2 for length in long),  # half is a prefix
        )


def _bucket_width(length: int) -> int:
    """Slots of an example in its bucket; see `models.attention.sdpa`."""
    if length >= ALONE_FROM:
        return length
    step = COARSE_WIDTH if length >= COARSE_FROM else FINE_WIDTH
    return -(-length // step) * step


@dataclass(frozen=True, slots=True)
class Kernels:
    """What computes a block, as far as memory goes."""

    attention: str
    element_bytes: int  # of the compute type
    is_compiled: bool = False
    recomputed: Literal["none", "block", "attention"] = "none"
    on_cpu: bool = False

    def writes_blocks_out(self, stack: StackConfig) -> bool:
        """Whether `models.cpu_block` takes the place of the layers."""
        is_plain = self.on_cpu and not self.is_compiled and self.attention == "sdpa"
        return is_plain and self.element_bytes == FLOAT_BYTES and stack.norm_type == "pre"


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one application of a block."""

    forward: int  # from the forward pass to the backward pass
    backward: int  # on top of it, while the block has its backward pass, at the most


def kept_by_block(stack: StackConfig, rows: Rows, kernels: Kernels) -> Kept:
    """What one application of one block of the stack keeps."""
    size, width, inner = kernels.element_bytes, stack.hidden_size, stack.mlp_size
    attention, mlp = (sum(half) for half in kept_tensors(stack, rows, kernels))
    block_input = rows.tokens * width * size
    # Gradients of gate and up; where a half is one function, with that of their product.
    inside = 3 * inner + 2 * width if kernels.writes_blocks_out(stack) else 2 * inner - width
    gradients = rows.tokens * size * inside
    if kernels.recomputed == "block":
        return Kept(block_input, attention + mlp + gradients)
    if kernels.recomputed == "attention":
        return Kept(block_input + mlp, max(gradients, attention - mlp + gradients // 2))
    return Kept(attention + mlp, gradients)


def kept_tensors(stack: StackConfig, rows: Rows, kernels: Kernels) -> tuple[list[int], list[int]]:
    """Bytes of each tensor that the two halves of a block keep: attention, MLP."""
    size, passes = kernels.element_bytes, PASSES.get(kernels.attention, 1)
    state, inner = (rows.tokens * n * size for n in (stack.hidden_size, stack.mlp_size))
    scale = rows.tokens * FLOAT_BYTES  # of a norm
    sums = rows.tokens * stack.num_heads * FLOAT_BYTES  # log-sum-exp of each query
    if kernels.writes_blocks_out(stack):
        of_rows = rows.sums * stack.num_heads * FLOAT_BYTES
        return [state, scale, 4 * state, state, of_rows], [state, scale, 2 * inner]
    if kernels.is_compiled:
        # input, norm, query and key, what they are parts of, product, sum; and of each pass
        attention = [*[state] * 3, scale, 2 * state, 4 * state, *[state, sums] * passes]
        return attention, [*[state] * 3, scale, 2 * inner, inner]
    in_fp32 = rows.tokens * stack.hidden_size * FLOAT_BYTES
    norm = [in_fp32, scale, state]  # what it reads, and what it gives
    mlp = [*norm, 2 * inner, inner, inner]  # gate and up together, silu, product
    after = [state] * 3  # sigmoid, what is mixed, their product
    if kernels.attention == "triton":  # rotation and gate are in the kernel
        return [*norm, 4 * state, state, sums, state], mlp
    if kernels.attention in PASSES:
        # query and key once rotated; the value keeps the whole projection that it is part of
        return [*norm, 2 * state, 4 * state, *[state, sums] * passes, *after], mlp
    slots = rows.slots * stack.hidden_size * size
    masks = rows.mask_entries * size
    of_slots = rows.slots * stack.num_heads * FLOAT_BYTES
    return [*norm, *[slots] * 4, of_slots, masks, *after], mlp


def share_in_blocks_above(limit: int, stack: StackConfig, rows: Rows, kernels: Kernels) -> float:
    """Of what a block keeps, the part in tensors of more than `limit` bytes."""
    attention, mlp = kept_tensors(stack, rows, kernels)
    tensors = [*attention, *mlp]
    return sum(each for each in tensors if each > limit) / sum(tensors)


def kept_by_final_norm(stack: StackConfig, rows: Rows) -> int:
    """What the norm after the last block of a pre-norm stack keeps."""
    is_there = stack.norm_type == "pre"
    return rows.tokens * (stack.hidden_size + 1) * FLOAT_BYTES * is_there


def shared_bytes(config: NetConfig, rows: Rows, kernels: Kernels) -> int:
    """What all blocks read: cosines and sines, and where attention has them, buckets and masks."""
    kinds = {
        (stack.head_size, stack.rope_theta)
        for stack in config.stacks().values()
        if stack.pos_emb_type == "rope"
    }
    angles = sum(2 * rows.tokens * head_size * FLOAT_BYTES for head_size, _ in kinds)
    if kernels.attention != "sdpa":
        return angles
    if all(map(kernels.writes_blocks_out, config.stacks().values())):
        return angles + rows.long_mask_entries * FLOAT_BYTES
    return angles + 16 * rows.slots + rows.mask_entries * (1 + FLOAT_BYTES)
