"""Attention of one new token a row on CPUs in fp32, compiled by numba.

torch's own kernel makes two matrix products of one row for each head and reads all rows up to the
longest. This one reads what a row holds and no more, in the order in which it lies in memory: 64
tokens of a head side by side, so that products and softmax run over them in vectors.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import float32, int64, njit, types
from torch import Tensor

from models.cpu_threads import share_out

BLOCK = 64
HEAD_SIZE_STEP = 4  # products take so many numbers of a head at once
ROWS_PER_THREAD = 2  # at least, or handing them out takes longer than the work
F32 = np.float32
LOG2_E = F32(math.log2(math.e))
# 2^x - 1 over x for x in [-0.5, 0.5], from the Taylor series: relative error of 2^x below 2e-7
P1, P2, P3, P4, P5, P6 = (F32(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))
LEAST_EXPONENT = F32(-126)  # 2 to this is the smallest normal number

_options = {"fastmath": True, "error_model": "numpy", "nogil": True}
_rows = types.Array(float32, 3, "A")  # [B, H, K], perhaps a part of a projection
_caches = types.Array(float32, 5, "C")  # [B + 1, L / BLOCK, H, K, BLOCK]
_mixed = types.Array(float32, 3, "C")
_positions = types.Array(int64, 1, "C")


class NumbaRowKernel:
    """A `models.kv_cache.RowKernel` for heads whose size is a multiple of HEAD_SIZE_STEP."""

    block = BLOCK

    def zeros(self, *shape: int) -> Tensor:
        """In huge pages where the system has them, which numpy asks for and torch does not: what is
        read once a token is read 1.3 to 1.4 times as fast. Pages that nobody writes take no memory.
        """
        return torch.from_numpy(np.zeros(shape, F32))

    def attend(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
    ) -> Tensor:
        num_rows = len(positions)
        mixed = torch.empty(new[0].shape)
        tensors = (*new, keys, values, positions, mixed)
        attend = partial(_attend, *(tensor.numpy() for tensor in tensors))
        share_out(attend, num_rows, max_parts=num_rows // ROWS_PER_THREAD)
        return mixed


@njit(inline="always", **_options)
def _score(query: Any, keys: Any, scores: Any, width: int) -> None:
    """Products of `query` [K] with the first `width` columns of `keys` [K, BLOCK]."""
    for column in range(width):
        scores[column] = F32(0)
    for k in range(0, len(query), HEAD_SIZE_STEP):
        q0, q1, q2, q3 = query[k], query[k + 1], query[k + 2], query[k + 3]
        for column in range(width):
            scores[column] += (q0 * keys[k, column] + q1 * keys[k + 1, column]) + (
                q2 * keys[k + 2, column] + q3 * keys[k + 3, column]
            )


@njit(inline="always", **_options)
def _mix(weights: Any, values: Any, mixed: Any, width: int) -> None:
    """Adds to `mixed` [K] the first `width` columns of `values` [K, BLOCK], weighted."""
    for k in range(len(mixed)):
        total = F32(0)
        for column in range(width):
            total += weights[column] * values[k, column]
        mixed[k] += total


@njit(inline="always", **_options)
def _softmax(scores: Any, length: int) -> None:
    """In place, of scores that are logarithms to base 2: numba's own exp is not vectorised."""
    largest = scores[0]
    for column in range(1, length):
        largest = max(largest, scores[column])
    bits = scores.view(np.int32)
    for column in range(length):
        x = max(scores[column] - largest, LEAST_EXPONENT)  # at most 0
        whole = np.int32(x - F32(0.5))  # rounds to the nearest, as x is not positive
        f = x - F32(whole)
        power = P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6))))
        scores[column] = F32(1) + f * power
        bits[column] += np.int32(whole << 23)  # the exponent of a float starts at bit 23
    total = F32(0)
    for column in range(length):
        total += scores[column]
    for column in range(length):
        scores[column] /= total


@njit(
    (_rows, _rows, _rows, _caches, _caches, _positions, _mixed, int64, int64),
    cache=True,
    **_options,
)
def _attend(
    query: Any,
    key: Any,
    value: Any,
    keys: Any,
    values: Any,
    positions: Any,
    mixed: Any,
    first: int,
    end: int,
) -> None:
    """Rows `first` to `end` of what `NumbaRowKernel.attend` does."""
    num_heads, head_size = query.shape[1:]
    scale = LOG2_E / F32(math.sqrt(head_size))
    scores = np.empty((num_heads, keys.shape[1] * BLOCK), F32)
    scaled = np.empty((num_heads, head_size), F32)
    for row in range(first, end):
        length = positions[row] + 1
        newest, offset = positions[row] // BLOCK, positions[row] % BLOCK
        num_full = length // BLOCK
        rest = length - num_full * BLOCK
        for head in range(num_heads):
            for k in range(head_size):
                keys[row, newest, head, k, offset] = key[row, head, k]
                values[row, newest, head, k, offset] = value[row, head, k]
                scaled[head, k] = query[row, head, k] * scale
                mixed[row, head, k] = F32(0)
        for block in range(num_full):
            for head in range(num_heads):
                _score(scaled[head], keys[row, block, head], scores[head, block * BLOCK :], BLOCK)
        if rest:
            for head in range(num_heads):
                where = scores[head, num_full * BLOCK :]
                _score(scaled[head], keys[row, num_full, head], where, rest)
        for head in range(num_heads):
            _softmax(scores[head], length)
        for block in range(num_full):
            for head in range(num_heads):
                weights = scores[head, block * BLOCK :]
                _mix(weights, values[row, block, head], mixed[row, head], BLOCK)
        if rest:
            for head in range(num_heads):
                weights = scores[head, num_full * BLOCK :]
                _mix(weights, values[row, num_full, head], mixed[row, head], rest)
