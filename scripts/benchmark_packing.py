"""How fast are examples packed into rows? This repository against a literal LPT multipack.

    python scripts/benchmark_packing.py
    python scripts/benchmark_packing.py --examples 200000 --replicas 64 --json packing.json

The literal side sorts and runs LPT in full at each step of the bisection, compiled by numba too.
Both sides take turns in one process on the same lengths, and their groups are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multipack_sampler import EpochCount, MultipackSampler, count_epoch

Result = TypeVar("Result")
Groups = list[NDArray[np.int64]]


@njit(cache=True, nogil=True)
def add_to_root(loads: NDArray[np.int64], heap: NDArray[np.int64], length: int, width: int) -> int:
    """Puts an example onto the row at the root of the heap, which sinks; the row, or -1: full."""
    load, row = loads[1] + length, heap[1]
    if load > width:
        return -1
    rows = len(loads) - 1
    slot = 1
    while 2 * slot <= rows:
        child = 2 * slot
        if child < rows and loads[child + 1] < loads[child]:
            child += 1
        if loads[child] >= load:
            break
        loads[slot], heap[slot] = loads[child], heap[child]
        slot = child
    loads[slot], heap[slot] = load, row
    return row


@njit(cache=True, nogil=True)
def lpt_fits(lengths: NDArray[np.int32], rows: int, width: int) -> bool:
    loads, heap = np.zeros(rows + 1, np.int64), np.arange(-1, rows)
    for length in np.sort(lengths)[::-1]:  # noqa: SIM110 -- numba compiles no generators
        if add_to_root(loads, heap, length, width) < 0:
            return False
    return True


@njit(cache=True, nogil=True)
def literal_row(
    lengths: NDArray[np.int32], start: int, rows: int, width: int, rank: int
) -> tuple[NDArray[np.int64], int]:
    """One rank's examples of the next global batch, and the number of examples of all ranks."""
    total, stop = 0, start
    while stop < len(lengths) and total < rows * width:
        total += lengths[stop]
        stop += 1
    low, high = 1, stop - start + 1
    while high - low > 1:
        middle = (low + high) // 2
        if lpt_fits(lengths[start : start + middle], rows, width):
            low = middle
        else:
            high = middle
    loads, heap = np.zeros(rows + 1, np.int64), np.arange(-1, rows)
    indices = np.empty(low, np.int64)
    count = 0
    for offset in np.argsort(lengths[start : start + low], kind="mergesort")[::-1]:
        if add_to_root(loads, heap, lengths[start + int(offset)], width) == rank:
            indices[count] = start + offset
            count += 1
    return indices[:count], low


def literal_groups(lengths: NDArray[np.int32], rows: int, width: int, rank: int) -> Groups:
    groups, start = [], 0
    while start < len(lengths):
        indices, used = literal_row(lengths, start, rows, width, rank)
        start += used
        if used < rows or start == len(lengths):
            break
        groups.append(indices)
    return groups


def our_groups(lengths: NDArray[np.int32], rows: int, width: int, rank: int) -> Groups:
    sampler = MultipackSampler(
        lengths, batch_max_length=width, num_replicas=rows, rank=rank, drop_last_batch=True
    )
    return [row.indices for row in sampler]


def our_count(lengths: NDArray[np.int32], rows: int, width: int) -> EpochCount:
    return count_epoch(lengths, batch_max_length=width, num_replicas=rows, drop_last_batch=True)


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """CPU time of this process, whatever else the machine is doing: both sides have one thread."""
    started_at = time.process_time()
    result = function()
    return time.process_time() - started_at, result


def draw_lengths(arguments: argparse.Namespace) -> NDArray[np.int32]:
    generator = np.random.default_rng(arguments.seed)
    lengths = generator.lognormal(np.log(arguments.median), arguments.sigma, arguments.examples)
    return np.clip(lengths, 1, arguments.max_length).astype(np.int32)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both sides and the count of an epoch, in turns; SystemExit if groups differ."""
    lengths = draw_lengths(arguments)
    rows, width = arguments.replicas, arguments.row_tokens
    seconds: dict[str, list[float]] = {"literal": [], "ours": [], "count": []}
    count = our_count(lengths, rows, width)
    for run in range(arguments.repeats + 1):
        rank = run % rows
        literal_s, literal = timed(lambda rank=rank: literal_groups(lengths, rows, width, rank))
        ours_s, ours = timed(lambda rank=rank: our_groups(lengths, rows, width, rank))
        count_s, _ = timed(lambda: our_count(lengths, rows, width))
        is_same = len(literal) == len(ours) == count.num_batches and all(
            np.array_equal(a, b) for a, b in zip(literal, ours, strict=True)
        )
        if not is_same:
            raise SystemExit(f"rank {rank}: the groups differ from the literal ones")
        if run:  # the first run compiles
            for name, elapsed_s in zip(seconds, (literal_s, ours_s, count_s), strict=True):
                seconds[name].append(elapsed_s)
    ratios = [a / b for a, b in zip(seconds["literal"], seconds["ours"], strict=True)]
    return {
        "settings": {k: v for k, v in vars(arguments).items() if k != "json"},
        "machine": f"{platform.machine()}, {platform.platform()}",
        "global_batches": count.num_batches,
        "max_row_examples": count.max_row_examples,
        "filled_share": count.filled_tokens / max(1, count.num_batches * rows * width),
        "seconds": seconds,
        "median_s": {name: median(values) for name, values in seconds.items()},
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "identical_groups": True,
    }


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text above as it stands, and defaults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000, help="lengths to pack")
    parser.add_argument("--replicas", type=int, default=8, help="rows of a global batch")
    parser.add_argument("--row-tokens", type=int, default=98_304, help="tokens of a row")
    parser.add_argument("--median", type=float, default=300, help="of the lognormal lengths")
    parser.add_argument("--sigma", type=float, default=1.0, help="of their logarithm")
    parser.add_argument("--max-length", type=int, default=4096, help="longer ones are cut")
    parser.add_argument("--repeats", type=int, default=5, help="after one run that compiles")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    result = measure(arguments)
    times = result["median_s"]
    low, high = result["ratio_range"]
    print(f"{arguments.examples:,} lengths, {arguments.replicas} x {arguments.row_tokens:,} tokens")
    print(f"{result['global_batches']:,} global batches, {result['filled_share']:.2%} full")
    print(f"literal  {times['literal']:.4f} s of CPU for one rank (medians of {arguments.repeats})")
    print(f"ours     {times['ours']:.4f} s, {result['ratio']:.1f}x ({low:.1f} to {high:.1f})")
    print(f"count    {times['count']:.4f} s for the steps, slots and padding of all ranks")
    print("groups   identical")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
