"""Devices, process groups and sharding; acts on finished models from outside.

Without `torchrun` the world is one process and every collective is a no-op.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

from models.transformer import Block

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system, by who sees the run's folder on it."""

    host: str  # of its keeper
    ranks: tuple[int, ...]  # ascending

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Disk:
        """What `asdict` made of one, from a file that anybody may have written."""
        host = "".join(each if each.isprintable() else "?" for each in str(record["host"]))
        return cls(host, tuple(map(int, record["ranks"])))

    @property
    def keeper(self) -> int:
        """The rank that does what is done once on each disk."""
        return self.ranks[0]

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        if len(self.ranks) == 1:
            return f"{self.host} (rank {first})"
        is_row = last - first + 1 == len(self.ranks)
        told = f"{first}-{last}" if is_row else ", ".join(map(str, self.ranks))
        return f"{self.host} (ranks {told})"


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    disks: tuple[Disk, ...] = ()  # see `training.disks`; none: all ranks see one folder

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def keepers(self) -> tuple[int, ...]:
        """One rank of each disk, rank 0 first."""
        return tuple(disk.keeper for disk in self.disks) or (0,)

    @property
    def is_keeper(self) -> bool:
        return self.rank in self.keepers

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over ranks, a new tensor on CPU."""
        if self.size == 1:
            return values.cpu()
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def broadcast(self, text: str, source: int = 0) -> str:
        """The text of rank `source` on every rank."""
        return self.broadcast_bytes(text.encode(), source).decode()

    def broadcast_bytes(self, content: bytes, source: int = 0) -> bytes:
        """The bytes of rank `source` on every rank; what the others give does not matter."""
        if self.size == 1:
            return content
        length = torch.tensor([len(content)], device=self.device)
        dist.broadcast(length, src=source)
        if not length:
            return b""
        if self.rank == source:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        else:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=source)
        return content if self.rank == source else data.cpu().numpy().tobytes()

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA (which includes ROCm builds), else MPS, else CPU. The only place that looks."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, is_there in available.items() if is_there)
    if not available.get(name):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ValueError(f"device={name} is not available here; this machine has {there}")
    return torch.device(name)


def device_note(device: torch.device) -> str:
    """Which device this is, and whether anybody has tried it."""
    if device.type == "cuda":
        kind = "ROCm" if torch.version.hip else "CUDA"
        return f"{torch.cuda.get_device_name(device)} ({kind}: untested)"
    return {"mps": "Apple GPU (MPS: untested)", "cpu": "CPU"}[device.type]


def start_world(device_name: str, hang_minutes: float | None = None) -> World:
    """Joins the process group that `torchrun` describes, if it does.

    A collective fails later than a watchdog of `hang_minutes` says which rank it waits for.
    """
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return World(rank=0, size=1, device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "mps":
        raise ValueError("several processes cannot share an MPS device; use device=cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = TIMEOUT if hang_minutes is None else timedelta(minutes=hang_minutes + 1)
    # Where torchrun keeps its store over a restart, addresses of processes that died stand in it.
    found, rank, size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def stop_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_threads(
    num_threads: int | None, recorded: Mapping[str, Any], num_processes: int
) -> tuple[int, str]:
    """Sets this process's threads for CPU kernels; returns their number and why it is that.

    None: OMP_NUM_THREADS, else what the run had before with as many processes (`recorded`), else
    one core is left to the data worker, since more threads than free cores make a step up to 9
    times slower.
    """
    from_environment = os.environ.get("OMP_NUM_THREADS")
    before = recorded.get("threads") if recorded.get("processes") == num_processes else None
    if num_threads is not None:
        reason = "asked for"
    elif from_environment:
        num_threads, reason = int(from_environment), "OMP_NUM_THREADS"
    elif before is not None:
        num_threads, reason = before, "as before"
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_threads = max(1, ((cores or 1) - 1) // processes)
        reason = f"{cores} cores, {processes} processes, one core left for data"
    assert num_threads is not None
    if before is not None and num_threads != before:
        reason += f"; it was {before}: the run is no longer bit-equal"
    torch.set_num_threads(num_threads)
    # Second moments decay into denormal numbers, which CPUs compute slowly.
    torch.set_flush_denormal(True)
    return num_threads, reason


def set_deterministic(is_wanted: bool) -> None:
    """Kernels that give the same bits each time, on CUDA too; call it before CUDA starts."""
    if is_wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_wanted)


def shard_model(
    model: nn.Module,
    world: World,
    compute_dtype: torch.dtype,
    *,
    unit: type[nn.Module] = Block,
    replicas: int = 1,
) -> None:
    """FSDP2 over all ranks, in place: fp32 master weights and reductions, `compute_dtype` inside.

    The weights of each `unit` are gathered together. FSDP acts between units, so what is compiled
    as a whole must lie inside one, and be compiled before. With several `replicas` the ranks are so
    many groups in a row (HSDP): each holds all weights in shards, and gradients are summed within
    the group first. ValueError where the ranks do not make that many equal groups.

    One process in fp32 stays a plain module. One process in bf16 wraps the root alone, so that the
    same policy makes the compute copy. Gradients are summed over ranks, never averaged.
    """
    if world.size % replicas:
        fitting = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ValueError(
            f"fsdp_replicas={replicas} does not divide the {world.size} processes into equal "
            f"groups; use one of {', '.join(map(str, fitting))}"
        )
    if world.size == 1 and compute_dtype == torch.float32:
        return
    if not dist.is_initialized():
        store = dist.HashStore()
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = _mesh(world, replicas)
    # Rotary tables must stay fp32, so inputs are not cast; a recurrent net would gather each block
    # again for every application if it were resharded after forward.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if world.size > 1:
        for module in model.modules():
            if isinstance(module, unit):
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.register_forward_hook(_require_gradient)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded_modules(model):
        if world.size > 1:  # alone it would divide by 1, into a copy of all gradients
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(False)


def _mesh(world: World, replicas: int) -> DeviceMesh:
    """All ranks; in two dimensions where there are groups: weights are sharded over the last."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    return init_device_mesh(
        world.device.type,
        (replicas, world.size // replicas),
        mesh_dim_names=("replicate", "shard"),
    )


def _require_gradient(module: nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
    """FSDP reduces gradients once one reaches the root's output: at bp 1 none would, since then
    the head alone, which the loss applies, is trained."""
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Before each micro-batch: gradients are reduced over ranks with the last one only."""
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(is_last)


def reshard(model: nn.Module) -> None:
    """Puts gradients onto the local shards: after a backward pass and before the optimizer.

    Also after a pass without gradients: until then `parameters()` are the compute copies.
    """
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole compute copies on every rank, for passes other than `forward` (prefill, decode).

    All ranks enter it together, after a first `forward`; inside, nothing is gathered, so each may
    make passes of its own.
    """
    for module in _sharded_modules(model):
        module.unshard()
    try:
        yield
    finally:
        reshard(model)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
