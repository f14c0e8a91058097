"""Makes batches ahead of the training loop, in one process of its own.

Owns that process: how rows come back from it, and how it ends. It does not know what is in a row.
Rows come back through a ring of shared memory: sent as tensors, which take a file descriptor each,
or through a pipe, they cost more than it takes to make them.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.batch import PackedBatch

ROWS_AHEAD = 4

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

    That process ends with this iterator, and with the process that called.
    """
    if num_workers == 0:
        fresh_rows = (np.empty(source.row_size, np.int32) for _ in itertools.count())
        return _batches(source, source.fill_rows(fresh_rows), pin_memory)
    if num_workers == 1:
        return _batches(source, _rows_ahead(source), pin_memory)
    raise ValueError(f"{num_workers=} must be 0 or 1: one process keeps the order of batches")


def load_global_batches(
    source: RowSource, device: torch.device, *, num_workers: int
) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of each global batch, on the device.

    Each is on its way there while the one before it is computed.
    """
    is_cuda = device.type == "cuda"
    complete: list[PackedBatch] = []
    coming: list[PackedBatch] = []
    for batch in load_batches(source, num_workers=num_workers, pin_memory=is_cuda):
        coming.append(batch.to(device, non_blocking=is_cuda))
        if batch.micro_index + 1 < batch.num_micro:
            continue
        if complete:
            yield complete
        complete, coming = coming, []
    if complete:
        yield complete


def _batches(
    source: RowSource, rows: Iterator[tuple[Row, Any]], pin_memory: bool
) -> Iterator[PackedBatch]:
    for row, counts in rows:
        batch = source.batch(row, counts)
        yield batch.pin_memory() if pin_memory else batch


def _rows_ahead(source: RowSource) -> Iterator[tuple[Row, Any]]:
    """Starts the worker, which ends with its rows, or once nobody can ask for them."""
    # A fork starts at once and needs no importable __main__; the worker never touches CUDA.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    ring = torch.empty(ROWS_AHEAD, source.row_size, dtype=torch.int32).share_memory_()
    free_slots = context.Semaphore(ROWS_AHEAD)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(source, ring, free_slots, sender), daemon=True)
    gc.collect()  # the fork must not find an earlier iterator as garbage, and stop its worker
    worker.start()
    sender.close()  # so that the worker's end is seen here
    atexit.register(worker.kill)  # before multiprocessing waits for all that is left
    rows = _received_rows(worker, receiver, ring, free_slots)
    weakref.finalize(rows, _stop, worker)
    return rows


def _received_rows(
    worker: BaseProcess, receiver: Connection, ring: Tensor, free_slots: Semaphore
) -> Iterator[tuple[Row, Any]]:
    for row in itertools.cycle(list(ring.numpy())):
        try:
            message = receiver.recv()
        except EOFError:
            worker.join()
            raise RuntimeError(
                f"the process that makes batches died (exit code {worker.exitcode}), maybe for "
                "lack of memory; data_workers=0 makes them in the main process"
            ) from None
        if message is None:
            return
        if isinstance(message, Exception):
            raise message
        copied = row.copy()
        free_slots.release()
        yield copied, message


def _stop(worker: BaseProcess) -> None:
    atexit.unregister(worker.kill)
    worker.kill()
    worker.join()


def _work(source: RowSource, ring: Tensor, free_slots: Semaphore, sender: Connection) -> None:
    """Runs in the worker. It leaves signals to the main process, and ends with it."""
    gc.freeze()  # what was inherited is neither garbage here nor worth copying
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def free_rows() -> Iterator[Row]:
        for row in itertools.cycle(list(ring.numpy())):
            free_slots.acquire()
            yield row

    try:
        for _, counts in source.fill_rows(free_rows()):
            sender.send(counts)
        sender.send(None)
    except Exception as error:
        error.add_note(f"in the process that makes batches:\n{traceback.format_exc()}")
        sender.send(error)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
