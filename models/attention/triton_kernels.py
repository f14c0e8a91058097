"""Triton kernels of PrefixLM attention in one pass: forward, and both halves of the backward pass.

A program has a part of a tile (`one_pass.sequence_tiles`) of one head: ROWS rows of one sequence.
Row i sees the keys from the sequence's `start` to before max(prefix_end, i + 1), so what a program
visits is one range, whose blocks are masked only where that edge runs through them. Each program
writes its own rows alone: no atomics, the same result every time. Products accumulate in fp32;
scores are kept in powers of two, since exp2 is what the hardware has.

Needs triton on import: import it in the function that launches.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import triton
import triton.language as tl

from models.attention.triton_rows import load, rotated_back, store

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part_of_tile(tiles, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The rows `first` to before `stop` of this program's sequence, its start and prefix's end."""
    program = tl.program_id(0)
    tile = tiles + program // PARTS * 4
    first = tl.load(tile) + program % PARTS * ROWS
    return first, tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def _product(left, right):
    """fp32 [M, N] of [M, K] and [K, N]; fp32 operands as three products of tf32, about as exact."""
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def _mix_blocks(
    state, q, key, value, row, prefix_end, begin, end, head, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys from `begin` to before `end` into the running softmax."""
    mixed, top, total = state
    for block in tl.range(begin, end, KEYS):
        k = load(key, block, end, head, SIZE, HEAD, KEYS)
        v = load(value, block, end, head, SIZE, HEAD, KEYS)
        scores = _product(q, tl.trans(k)) * scale
        if IS_MASKED:
            column = block + tl.arange(0, KEYS)
            is_visible = column[None, :] < tl.maximum(row + 1, prefix_end)[:, None]
            scores = tl.where(is_visible, scores, float("-inf"))
        # Every row sees its sequence's first key, in the first block: `higher` is never infinite.
        higher = tl.maximum(top, tl.max(scores, 1))
        shrunk = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        mixed = mixed * shrunk[:, None] + _product(weights.to(v.dtype), v)
        top = higher
    return mixed, top, total


@triton.jit
def forward_kernel(
    query, key, value, gate, mixed, gated, logsumexp, tiles, num_rows, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Mixed values [T, H, K], and the scores' log-sum-exp [H, T], in powers of two.

    With a `gate`, which may be None, also sigmoid(gate) * mixed.
    """
    first, stop, start, prefix_end = _part_of_tile(tiles, ROWS, PARTS)
    head = tl.program_id(1)
    if first >= stop:
        return
    row = first + tl.arange(0, ROWS)
    scale *= LOG2_E
    q = load(query, first, stop, head, SIZE, HEAD, ROWS)
    # All of its rows see the keys before `whole`, none sees one from `end` on.
    end = tl.maximum(tl.minimum(first + ROWS, stop), prefix_end)
    whole = tl.maximum(tl.maximum(first + 1, prefix_end) - start, 0) // BLOCK * BLOCK + start
    state = (
        tl.zeros((ROWS, HEAD), tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )
    state = _mix_blocks(
        state, q, key, value, row, prefix_end, start, whole, head, scale, SIZE, HEAD, BLOCK, False
    )
    state = _mix_blocks(
        state, q, key, value, row, prefix_end, whole, end, head, scale, SIZE, HEAD, BLOCK, True
    )
    result, top, total = state
    sees_nothing = total == 0.0  # padding
    total = tl.where(sees_nothing, 1.0, total)
    result /= total[:, None]
    store(mixed, result, first, stop, head, SIZE, HEAD, ROWS)
    if gate is not None:
        opened = tl.sigmoid(load(gate, first, stop, head, SIZE, HEAD, ROWS).to(tl.float32))
        store(gated, opened * result, first, stop, head, SIZE, HEAD, ROWS)
    sums = tl.where(sees_nothing, 0.0, top + tl.log2(total))
    tl.store(logsumexp + head * num_rows + row, sums, mask=row < stop)


@triton.jit
def _query_gradient_blocks(
    total, q, grad, sums, delta, key, value, row, prefix_end, begin, end, head, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, KEYS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `begin` to before `end` give."""
    for block in tl.range(begin, end, KEYS):
        k = load(key, block, end, head, SIZE, HEAD, KEYS)
        v = load(value, block, end, head, SIZE, HEAD, KEYS)
        weights = tl.exp2(_product(q, tl.trans(k)) * scale - sums[:, None])
        if IS_MASKED:
            column = block + tl.arange(0, KEYS)
            is_visible = column[None, :] < tl.maximum(row + 1, prefix_end)[:, None]
            weights = tl.where(is_visible, weights, 0.0)
        of_scores = weights * (_product(grad, tl.trans(v)) - delta[:, None])
        total += _product(of_scores.to(k.dtype), k)
    return total


@triton.jit
def query_gradient_kernel(
    grad, query, key, value, gate, mixed, logsumexp, cos, sin,
    delta, grad_mixed, grad_gate, grad_query, tiles, num_rows, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries; writes grad @ mixed of each row to `delta` [H, T] too.

    With a `gate`, `grad` is that of what was gated, and those of mixed values and gate are written
    too. With `cos`, the queries were rotated, and the gradient is that of what they were before.
    """
    first, stop, start, prefix_end = _part_of_tile(tiles, ROWS, PARTS)
    head = tl.program_id(1)
    if first >= stop:
        return
    row = first + tl.arange(0, ROWS)
    q = load(query, first, stop, head, SIZE, HEAD, ROWS)
    g = load(grad, first, stop, head, SIZE, HEAD, ROWS)
    m = load(mixed, first, stop, head, SIZE, HEAD, ROWS).to(tl.float32)
    if gate is not None:
        opened = tl.sigmoid(load(gate, first, stop, head, SIZE, HEAD, ROWS).to(tl.float32))
        of_gate = g.to(tl.float32) * m * opened * (1.0 - opened)
        store(grad_gate, of_gate, first, stop, head, SIZE, HEAD, ROWS)
        g = (g.to(tl.float32) * opened).to(g.dtype)
        store(grad_mixed, g, first, stop, head, SIZE, HEAD, ROWS)
    d = tl.sum(g.to(tl.float32) * m, 1)
    tl.store(delta + head * num_rows + row, d, mask=row < stop)
    sums = tl.load(logsumexp + head * num_rows + row, mask=row < stop, other=0.0)
    end = tl.maximum(tl.minimum(first + ROWS, stop), prefix_end)
    whole = tl.maximum(tl.maximum(first + 1, prefix_end) - start, 0) // BLOCK * BLOCK + start
    total = tl.zeros((ROWS, HEAD), tl.float32)
    base2 = scale * LOG2_E
    total = _query_gradient_blocks(
        total, q, g, sums, d, key, value, row, prefix_end, start, whole, head, base2,
        SIZE, HEAD, BLOCK, False,
    )  # fmt: skip
    total = _query_gradient_blocks(
        total, q, g, sums, d, key, value, row, prefix_end, whole, end, head, base2,
        SIZE, HEAD, BLOCK, True,
    )  # fmt: skip
    total *= scale
    if cos is not None:
        total = rotated_back(total, cos, sin, first, stop, HEAD, ROWS)
    store(grad_query, total, first, stop, head, SIZE, HEAD, ROWS)


@triton.jit
def _key_gradient_blocks(
    totals, k, v, grad, query, logsumexp, delta, column, prefix_end, begin, end, stop, head, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, QUERIES: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries from `begin` to before `end` give. Scores are [keys, queries] here."""
    of_keys, of_values = totals
    for block in tl.range(begin, end, QUERIES):
        q = load(query, block, stop, head, SIZE, HEAD, QUERIES)
        g = load(grad, block, stop, head, SIZE, HEAD, QUERIES)
        row = block + tl.arange(0, QUERIES)
        sums = tl.load(logsumexp + row, mask=row < stop, other=0.0)
        d = tl.load(delta + row, mask=row < stop, other=0.0)
        weights = tl.exp2(_product(k, tl.trans(q)) * scale - sums[None, :])
        if IS_MASKED:
            is_visible = column[:, None] < tl.maximum(row + 1, prefix_end)[None, :]
            weights = tl.where(is_visible, weights, 0.0)
        of_values += _product(weights.to(g.dtype), g)
        of_scores = weights * (_product(v, tl.trans(g)) - d[None, :])
        of_keys += _product(of_scores.to(q.dtype), q)
    return of_keys, of_values


@triton.jit
def key_gradient_kernel(
    grad, query, key, value, logsumexp, delta, cos, sin, grad_key, grad_value, tiles, num_rows,
    scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, after `query_gradient_kernel` has written `delta`.

    `grad` is that of the mixed values, with a gate too; `cos` as there.
    """
    first, stop, start, prefix_end = _part_of_tile(tiles, ROWS, PARTS)
    head = tl.program_id(1)
    if first >= stop:
        return
    column = first + tl.arange(0, ROWS)
    k = load(key, first, stop, head, SIZE, HEAD, ROWS)
    v = load(value, first, stop, head, SIZE, HEAD, ROWS)
    # A key of the prefix is seen by the whole sequence, another one from its own row on. Queries
    # from `whole` on see all of the keys here. In padding `start` is T: nothing is visited.
    begin = tl.where(first < prefix_end, start, tl.maximum(first, start))
    last = tl.minimum(first + ROWS, stop) - 1
    is_split = last >= prefix_end
    num_masked = tl.where(is_split, tl.maximum(last - begin, 0), 0)
    whole = tl.minimum((num_masked + BLOCK - 1) // BLOCK * BLOCK + begin, tl.maximum(stop, begin))
    totals = (tl.zeros((ROWS, HEAD), tl.float32), tl.zeros((ROWS, HEAD), tl.float32))
    sums, d = logsumexp + head * num_rows, delta + head * num_rows
    base2 = scale * LOG2_E
    totals = _key_gradient_blocks(
        totals, k, v, grad, query, sums, d, column, prefix_end, begin, whole, stop, head, base2,
        SIZE, HEAD, BLOCK, True,
    )  # fmt: skip
    totals = _key_gradient_blocks(
        totals, k, v, grad, query, sums, d, column, prefix_end, whole, stop, stop, head, base2,
        SIZE, HEAD, BLOCK, False,
    )  # fmt: skip
    of_keys, of_values = totals
    of_keys *= scale
    if cos is not None:
        of_keys = rotated_back(of_keys, cos, sin, first, stop, HEAD, ROWS)
    store(grad_key, of_keys, first, stop, head, SIZE, HEAD, ROWS)
    store(grad_value, of_values, first, stop, head, SIZE, HEAD, ROWS)
