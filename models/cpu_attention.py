"""PrefixLM attention of short sequences on a CPU in fp32, forward and backward pass.

Compiled by numba, as `models.cpu_kernels`. One sequence and head after another: its scores fit into
a cache, and nothing is gathered, padded or masked in memory. Products are made of tiles, TILE_ROWS
by LANES, whose sums stay in vector registers: those of 30 tokens are as fast as large ones. Softmax
keeps of each row its largest score and 1 / its sum, and the backward pass makes the rest again.
A sequence depends neither on its neighbours nor on the number of threads.
Shapes: L tokens of a sequence, W = L rounded up to LANES; the rest as in `models.layers`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import int64, njit, types
from numba.core import cgutils
from torch import Tensor

from models.cpu_kernels import (
    F32,
    IN_ANY_ORDER,
    ONE,
    ZERO,
    Addresses,
    exp,
    floats,
    in_parts,
    instruction,
    integers,
    kernel,
)

LANES, TILE_ROWS = 16, 4
GRAIN = 1 << 12  # tokens times heads that a thread is given at least
FLOAT_BYTES = 4

Matrix = tuple[int, int, int]  # address of its first number; numbers from row to row, in a row


def mix(gqkv: Tensor, sequences: Tensor, mixed: Tensor) -> Tensor:
    """Fills rows of `mixed` [T, H, K] from `gqkv` [T, 4, H, K]; returns what `mix_backward` asks
    for. `sequences` [n, 3] int64: first row, length of the prefix, length of all."""
    softmax = gqkv.new_empty(*mixed.shape[:2], 2)
    _over_sequences(_mix, (gqkv, sequences, softmax, mixed), mixed.shape)
    return softmax


def mix_backward(
    grads: Tensor, gqkv: Tensor, sequences: Tensor, softmax: Tensor, into: Tensor
) -> None:
    """From `grads` of `mixed` to those of query, key and value: the same rows of `into`, which is
    [T, 4, H, K]."""
    _over_sequences(_mix_backward, (gqkv, sequences, softmax, grads, into), grads.shape)


def _over_sequences(function: Any, tensors: tuple[Tensor, ...], shape: torch.Size) -> None:
    num_rows, num_heads, size = shape
    num_sequences = len(tensors[1])
    max_parts = min(num_sequences, num_rows * num_heads // GRAIN)
    in_parts(function, tensors, (num_heads, size), num_sequences, max_parts=max_parts)


def _product_of(num_rows: int, *, is_whole: bool) -> Any:
    """`product(c, a, b, depth, columns)`: c = a b for so many rows, a [rows, depth], and LANES
    columns if it is whole, else for `columns`, up to LANES. b's rows have a step of 1, and c's."""
    short, long, single = ir.IntType(32), ir.IntType(64), ir.FloatType()
    vector, indices = ir.VectorType(single, LANES), ir.VectorType(short, LANES)
    zeros = ir.Constant(vector, [0.0] * LANES)
    lanes, first_lane = (ir.Constant(indices, each) for each in (list(range(LANES)), [0] * LANES))

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def spread(number: Any) -> Any:
            unset = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
            one = builder.insert_element(unset, number, short(0))
            return builder.shuffle_vector(one, unset, first_lane)

        def place(kind: Any, start: Any, *steps: tuple[Any, Any]) -> Any:
            for count, step in steps:
                numbers = builder.mul(count, step)
                start = builder.add(start, builder.mul(numbers, numbers.type(FLOAT_BYTES)))
            return builder.inttoptr(start, kind.as_pointer())

        def masked(name: str, result: Any, *given: Any) -> Any:
            kind = ir.FunctionType(result, [each.type for each in given])
            full_name = f"llvm.masked.{name}.v{LANES}f32.p0"
            return builder.call(
                cgutils.get_or_insert_function(builder.module, kind, full_name), given
            )

        c, a, b = (cgutils.unpack_tuple(builder, each) for each in values[:3])
        depth, columns = values[3:]
        is_there = builder.icmp_signed("<", lanes, spread(builder.trunc(columns, short)))
        align = short(FLOAT_BYTES)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(num_rows)]
        with cgutils.for_range(builder, depth) as loop:
            at = place(vector, b[0], (loop.index, b[1]))
            if is_whole:
                row = builder.load(at, align=FLOAT_BYTES)
            else:
                row = masked("load", vector, at, align, is_there, zeros)
            for number, total in enumerate(sums):
                at = place(single, a[0], (long(number), a[1]), (loop.index, a[2]))
                part = builder.fmul(spread(builder.load(at)), row, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), part, flags=("contract",)), total)
        for number, total in enumerate(sums):
            at = place(vector, c[0], (long(number), c[1]))
            if is_whole:
                builder.store(builder.load(total), at, align=FLOAT_BYTES)
            else:
                masked("store", ir.VoidType(), builder.load(total), at, align, is_there)
        return context.get_dummy_value()

    @instruction
    def product(typing: Any, c: Any, a: Any, b: Any, depth: Any, columns: Any) -> Any:
        matrix = types.UniTuple(int64, 3)
        return types.void(matrix, matrix, matrix, int64, int64), code

    return product


_tile, _narrow_tile = _product_of(TILE_ROWS, is_whole=True), _product_of(TILE_ROWS, is_whole=False)
_row = _product_of(1, is_whole=False)


@njit(forceinline=True)
def _from(matrix: Matrix, row: int, column: int) -> Matrix:
    """`matrix[row:, column:]`."""
    start, row_step, step = matrix
    return start + FLOAT_BYTES * (row * row_step + column * step), row_step, step


@njit(forceinline=True)
def _rows_of(c: Matrix, a: Matrix, b: Matrix, shape: tuple[int, int, int]) -> None:
    """c = a b; shape: rows, up to TILE_ROWS, depth and columns."""
    rows, depth, columns = shape
    for column in range(0, columns, LANES):
        left, into, right = columns - column, _from(c, 0, column), _from(b, 0, column)
        if rows == TILE_ROWS and left >= LANES:
            _tile(into, a, right, depth, left)
        elif rows == TILE_ROWS:
            _narrow_tile(into, a, right, depth, left)
        else:
            for row in range(rows):
                _row(_from(into, row, 0), _from(a, row, 0), right, depth, left)


@njit(forceinline=True)
def _of(array: Any) -> Matrix:
    return array.ctypes.data, array.shape[1], 1


@njit(forceinline=True)
def _padded(length: int) -> int:
    return (length + LANES - 1) // LANES * LANES


@njit(forceinline=True)
def _part(scratch: Any, rows: int, columns: int) -> Any:
    return scratch[: rows * columns].reshape(rows, columns)


@njit(forceinline=True)
def _transpose(matrix: Matrix, into: Any, factor: Any, length: int) -> None:
    """`into` [K, W] = factor * matrix [L, K] transposed; columns from L on are 0."""
    start, row_step, _ = matrix
    numbers = floats(start, ((length - 1) * row_step + into.shape[0],))
    for k in range(into.shape[0]):
        for row in range(length):
            into[k, row] = factor * numbers[row * row_step + k]
        for row in range(length, into.shape[1]):
            into[k, row] = ZERO


@njit(forceinline=True)
def _scores(query: Matrix, keys: Any, into: Any, prefix_len: int) -> None:
    """`into` [L, W] = query [L, K] keys [K, W], as far as rows see, rounded up to tiles."""
    length = len(into)
    for row in range(0, length, TILE_ROWS):
        rows = min(TILE_ROWS, length - row)
        shape = (rows, keys.shape[0], _padded(max(prefix_len, row + rows)))
        _rows_of(_from(_of(into), row, 0), _from(query, row, 0), _of(keys), shape)


@njit(forceinline=True)
def _weighted(weights: Any, values: Matrix, into: Matrix, size: int, prefix_len: int) -> None:
    """`into` [L, K] = weights [L, W] values [L, K]; weights of what a row does not see are 0."""
    length = len(weights)
    for row in range(0, length, TILE_ROWS):
        rows = min(TILE_ROWS, length - row)
        shape = (rows, max(prefix_len, row + rows), size)
        _rows_of(_from(into, row, 0), _from(_of(weights), row, 0), values, shape)


@njit(forceinline=True)
def _collected(weights: Any, values: Matrix, into: Matrix, size: int, prefix_len: int) -> None:
    """`into` [L, K] = weights [L, W] transposed, times values [L, K]."""
    length, (start, row_step, step) = len(weights), _of(weights)
    for row in range(0, length, TILE_ROWS):
        first = 0 if row < prefix_len else row  # what follows the prefix is seen from there on
        part = _from((start, step, row_step), row, first)
        shape = (min(TILE_ROWS, length - row), length - first, size)
        _rows_of(_from(into, row, 0), part, _from(values, first, 0), shape)


@njit(forceinline=True)
def _heads_of(gqkv: int, row: int, head: int, shape: tuple[int, int]) -> Any:
    """Query, key and value of one head from `row` on."""
    num_heads, size = shape
    start = gqkv + FLOAT_BYTES * ((row * 4 + 1) * num_heads + head) * size
    query = start, 4 * num_heads * size, 1
    return query, _from(query, 0, num_heads * size), _from(query, 0, 2 * num_heads * size)


@njit(forceinline=True)
def _longest(table: Any, first: int, end: int) -> int:
    longest = 0
    for index in range(first, end):
        longest = max(longest, table[index, 2])
    return longest


@kernel(4, int64, int64, fastmath=IN_ANY_ORDER)
def _mix(addresses: Addresses, numbers: tuple[int, int], first: int, end: int) -> None:
    gqkv, sequences, kept, mixed = addresses
    num_heads, size = numbers
    table = integers(sequences, (end, 3))
    longest = _longest(table, first, end)
    all_keys = np.empty(size * _padded(longest), F32)
    all_scores = np.empty(longest * _padded(longest), F32)
    scale = ONE / F32(math.sqrt(size))
    for index in range(first, end):
        start, prefix_len, length = table[index]
        columns = _padded(length)
        keys, scores = _part(all_keys, size, columns), _part(all_scores, length, columns)
        softmax = floats(kept + 2 * FLOAT_BYTES * start * num_heads, (length, num_heads, 2))
        for head in range(num_heads):
            query, key, value = _heads_of(gqkv, start, head, numbers)
            into = mixed + FLOAT_BYTES * (start * num_heads + head) * size, num_heads * size, 1
            _transpose(key, keys, scale, length)
            _scores(query, keys, scores, prefix_len)
            for row in range(length):
                sees = max(prefix_len, row + 1)
                largest = scores[row, 0]
                for i in range(sees):
                    largest = scores[row, i] if scores[row, i] > largest else largest
                total = ZERO
                for i in range(columns):
                    weight = exp(scores[row, i] - largest) if i < sees else ZERO
                    scores[row, i] = weight
                    total += weight
                share = ONE / total
                for i in range(columns):
                    scores[row, i] *= share
                softmax[row, head, 0], softmax[row, head, 1] = largest, share
            _weighted(scores, value, into, size, prefix_len)


@kernel(5, int64, int64, fastmath=IN_ANY_ORDER)
def _mix_backward(addresses: Addresses, numbers: tuple[int, int], first: int, end: int) -> None:
    gqkv, sequences, kept, grads, grad_gqkv = addresses
    num_heads, size = numbers
    table = integers(sequences, (end, 3))
    longest = _longest(table, first, end)
    all_columns = np.empty(size * _padded(longest), F32)
    all_weights = np.empty(longest * _padded(longest), F32)
    all_errors = np.empty(longest * _padded(longest), F32)
    scale = ONE / F32(math.sqrt(size))
    for index in range(first, end):
        start, prefix_len, length = table[index]
        width = _padded(length)
        turned, weights = _part(all_columns, size, width), _part(all_weights, length, width)
        errors = _part(all_errors, length, width)  # gradients to weights, then to scores
        softmax = floats(kept + 2 * FLOAT_BYTES * start * num_heads, (length, num_heads, 2))
        for head in range(num_heads):
            query, key, value = _heads_of(gqkv, start, head, numbers)
            of_query, of_key, of_value = _heads_of(grad_gqkv, start, head, numbers)
            grad = grads + FLOAT_BYTES * (start * num_heads + head) * size, num_heads * size, 1
            _transpose(key, turned, scale, length)
            _scores(query, turned, weights, prefix_len)
            _transpose(value, turned, ONE, length)
            _scores(grad, turned, errors, prefix_len)
            for row in range(length):
                sees = max(prefix_len, row + 1)
                largest, share = softmax[row, head, 0], softmax[row, head, 1]
                along = ZERO
                for i in range(width):
                    weight = exp(weights[row, i] - largest) * share if i < sees else ZERO
                    error = errors[row, i] if i < sees else ZERO
                    weights[row, i], errors[row, i] = weight, error
                    along += weight * error
                for i in range(width):
                    errors[row, i] = weights[row, i] * (errors[row, i] - along) * scale
            _weighted(errors, key, of_query, size, prefix_len)
            _collected(errors, query, of_key, size, prefix_len)
            _collected(weights, grad, of_value, size, prefix_len)
