"""Runs one function over many jobs: in processes of this machine, or on a Ray cluster.

Jobs and results are small and can be pickled; what is large goes through files that all workers
reach. Knows nothing of what a job does.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Job = TypeVar("Job")
Result = TypeVar("Result")
THREADS_VARIABLE = "RAYON_NUM_THREADS"  # of the tokenizers package
WATCH_SECONDS = 1.0
SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of Linux
PACKAGE = Path(__file__).resolve().parent


class ExecutorOptions(BaseModel):
    """Where jobs run. Options of a command may inherit from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    executor: Literal["local", "ray"] = Field(
        default="local", description="local: processes of this machine; ray: tasks of a cluster"
    )
    workers: PositiveInt | None = Field(
        default=None, description="files at a time; null: as many as there are cores"
    )
    address: str = Field(default="auto", description="of the Ray cluster; local starts one here")


def start_executor(options: ExecutorOptions) -> None:
    """Connects to what `run_jobs` will need. ValueError: it is not to be had."""
    if options.executor == "ray":
        _connect(options.address)


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], options: ExecutorOptions
) -> Iterator[Result]:
    """Results as they come, in no particular order; `start_executor` goes before it.

    Leaving the iterator early stops the rest.
    """
    run = _run_on_ray if options.executor == "ray" else _run_here
    yield from run(function, jobs, options)


def _run_here(
    function: Callable[[Job], Result], jobs: Sequence[Job], options: ExecutorOptions
) -> Iterator[Result]:
    cores = _num_cores()
    workers = min(options.workers or cores, len(jobs))
    if workers < 2:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(os.getpid(), -(-cores // workers)),
    )
    is_done = False
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()
        is_done = True
    except BrokenProcessPool:
        raise OSError(
            "a worker process died, as it does when memory runs out; run again with fewer: "
            f"workers={max(1, workers // 2)}"
        ) from None
    finally:
        if not is_done:
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _num_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare_worker(parent: int, num_threads: int) -> None:
    """In a new process: its share of the cores, and no life without its parent."""
    os.environ.setdefault(THREADS_VARIABLE, str(num_threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends its workers
    with contextlib.suppress(AttributeError, OSError, TypeError):  # at once, where there is Linux
        ctypes.CDLL(None).prctl(SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _connect(address: str) -> None:
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": [str(PACKAGE)]},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError) as error:
        raise ValueError(
            f"address={address}: no Ray cluster answers ({' '.join(str(error).split())}); "
            "start one (ray start --head), or use address=local"
        ) from None


def _run_on_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], options: ExecutorOptions
) -> Iterator[Result]:
    ray = _ray()
    remote: Any = ray.remote(function)
    env = {"env_vars": {THREADS_VARIABLE: "1"}}
    most = options.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, running = list(jobs), list[Any]()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                task = remote.options(num_cpus=1, runtime_env=env)
                running.append(task.remote(waiting.pop(0)))
            (ready, *_), running = ray.wait(running)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                raise OSError(f"a Ray task failed: {' '.join(str(error).split())}") from None
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            "executor=ray needs Ray, which is not installed: pip install -r requirements-ray.txt"
        ) from None
    return ray
