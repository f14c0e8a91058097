"""The process beside each rank that writes checkpoints while the rank trains on.

    python -m training.checkpoint_writer CONNECTION MEMORY PARENT     # started by training.saving

It saves as the rank would, with `RunDirectory.save`: what is written does not depend on who writes.
Several of them talk over a process group of their own. It never outlives the process that started
it: what a killed run had begun must not appear in a directory that another process trains in.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.checkpoint import Progress, RunDirectory
from training.distributed import Disk, World, stop_world
from training.host_copy import HostCopy, pieces_from
from training.parts import prune_steps

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICENESS = 5  # training goes first
ANOTHER_RANK = "another rank could not write its part"


def end_with(parent: int) -> None:
    """From here on the kernel kills this process as soon as `parent` dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def join_writers(world: World, address: dict[str, Any]) -> None:
    """The process group of the writers of all ranks."""
    timeout = timedelta(seconds=address["timeout_s"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        "gloo",
        timeout=timeout,
        store=dist.PrefixStore(address["prefix"], store),
        rank=world.rank,
        world_size=world.size,
    )


class CheckpointWriter:
    """Saves what lies in the copy, each time it is asked."""

    def __init__(self, begin: dict[str, Any], descriptor: int) -> None:
        disks = (Disk(each["host"], tuple(each["ranks"])) for each in begin["disks"])
        world = World(begin["rank"], begin["size"], torch.device("cpu"), tuple(disks))
        copy = HostCopy(pieces_from(begin["pieces"]), descriptor)
        copy.reserve()
        if world.size > 1:
            join_writers(world, begin["address"])
        self._state = copy.state()
        self._directory = RunDirectory(Path(begin["run"]), world)

    def save(self, job: dict[str, Any]) -> None:
        """Publishes a checkpoint, then removes those that are no longer kept."""
        self._directory.data = job["data"]
        progress = Progress(**job["progress"])
        self._directory.save(job["name"], self._state, progress, job["log_state"])
        if job["prunes"]:
            prune_steps(self._directory, job["keep_last"])


def serve(connection: Connection, descriptor: int) -> None:
    """Answers each job with what went wrong, "" for nothing; ends when the rank hangs up."""
    try:
        writer = CheckpointWriter(json.loads(connection.recv_bytes()), descriptor)
        while True:
            job = json.loads(connection.recv_bytes())
            writer.save(job)
            connection.send_bytes(b"")
    except EOFError:
        stop_world()
    except (OSError, ValueError) as error:
        connection.send_bytes(str(error).encode())
    except RuntimeError as error:  # of gloo: a writer that failed has left
        if not dist.is_initialized():
            raise
        connection.send_bytes(f"{ANOTHER_RANK} ({error})".encode())


def main() -> None:
    """Runs in the process; signals to stop are for the rank, which asked not to get them here."""
    connection, descriptor, parent = map(int, sys.argv[1:])
    end_with(parent)
    os.nice(NICENESS)
    torch.set_num_threads(1)
    serve(Connection(connection), descriptor)


if __name__ == "__main__":
    main()
