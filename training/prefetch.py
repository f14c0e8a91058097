"""Makes batches ahead of the training loop, in one process of its own.

Owns that process: what it is handed, how rows come back, how it ends. It does not know what is in a
row. Rows come back through a ring of shared memory; sent as tensors they would cost more than it
takes to make them (a file descriptor for each, or pipes of 64 KiB).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from models.batch import PackedBatch

ROWS_AHEAD = 4
# The loader asks for the next row before it hands one over: that one, and one to spare.
RING_ROWS = ROWS_AHEAD + 2

Row = NDArray[np.int32]


class RowSource(Protocol):
    """A dataset that can write its batches into given vectors; PrefixLMDataset is one."""

    row_size: int

    def fill_rows(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Any]]: ...

    def batch(self, row: Row, counts: Any) -> PackedBatch: ...


def load_batches(
    source: RowSource, *, num_workers: int, pin_memory: bool = False
) -> Iterator[PackedBatch]:
    """The batches of a dataset; with `num_workers=1` a process, started at once, makes them ahead.

    The process ends with this iterator, and with the process that called.
    """
    if num_workers not in (0, 1):
        raise ValueError(f"{num_workers=} must be 0 or 1: one process keeps the order of batches")
    if num_workers == 0:
        fresh_rows = (np.empty(source.row_size, np.int32) for _ in itertools.count())
        return _batches(source, source.fill_rows(fresh_rows), pin_memory)
    ring = torch.empty(RING_ROWS, source.row_size, dtype=torch.int32).share_memory_()
    slots = DataLoader(
        _RingWriter(source, ring),
        batch_size=None,
        num_workers=1,
        prefetch_factor=ROWS_AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=_set_up_worker,
        # Starts at once and needs no importable __main__; the worker never touches CUDA.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator(),  # else each start would draw from the run's own generator
    )
    return _batches(source, _copied_rows(iter(slots), ring), pin_memory)


def _batches(
    source: RowSource, rows: Iterator[tuple[Row, Any]], pin_memory: bool
) -> Iterator[PackedBatch]:
    for row, counts in rows:
        batch = source.batch(row, counts)
        yield batch.pin_memory() if pin_memory else batch


def _copied_rows(slots: Iterator[tuple[int, Any]], ring: Tensor) -> Iterator[tuple[Row, Any]]:
    for slot, counts in slots:
        yield ring[slot].numpy().copy(), counts


class _RingWriter(IterableDataset[tuple[int, Any]]):
    """Runs in the worker: writes rows into the ring, and tells into which slot."""

    def __init__(self, source: RowSource, ring: Tensor) -> None:
        super().__init__()
        self.source, self.ring = source, ring

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        rows = itertools.cycle(list(self.ring.numpy()))
        for number, (_, counts) in enumerate(self.source.fill_rows(rows)):
            yield number % RING_ROWS, counts


def _unchanged(item: Any) -> Any:
    return item


def _set_up_worker(worker_id: int) -> None:
    """Lets the main process decide when to stop: signals to the whole group are not for a worker.

    SIGTERM counts only from the parent, which ends its workers so; and the worker ends with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # later threads inherit this
        threading.Thread(target=_exit_on_sigterm, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_on_sigterm(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
