"""Threads for kernels compiled by numba: as many as torch has, kept from call to call."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch


def share_out(work: Callable[[int, int], None], end: int, *, max_parts: int) -> None:
    """Calls `work(first, end)` for up to `max_parts` parts of all before `end`, each in a thread.

    `work` must own the memory that it touches: after Ctrl-C nobody waits for it, and it runs on.
    """
    num_threads = torch.get_num_threads()
    num_parts = min(num_threads, max_parts)
    if num_parts < 2:
        work(0, end)
        return
    edges = [end * part // num_parts for part in range(num_parts + 1)]
    submit = _threads(num_threads).submit
    for call in [submit(work, *part) for part in pairwise(edges)]:
        call.result()


@lru_cache(1)
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="cpu-kernels")


if hasattr(os, "register_at_fork"):  # a forked process has the pool but none of its threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
