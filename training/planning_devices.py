"""What devices offer: memory, matrix products, links; a table of GPUs, and this machine.

Figures of GPUs are those of their data sheets, memory what torch reports of them, about.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from models.linear import product
from training.distributed import World

GIB = 2**30
PROBE_ROWS, PROBE_S = 1024, 0.3


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or a machine without."""

    name: str
    memory_gib: float
    tflops: float  # dense products in bf16, without sparsity; of this machine: probed
    link_gb_s: float  # to the others of its node, each way
    context_gib: float = 0.6  # of CUDA itself, beside what the allocator has
    is_cuda: bool = True


GPUS = {
    device.name: device
    for device in (
        Device("rtx3090", 23.7, 71, 25),
        Device("rtx4090", 23.6, 165, 25),
        Device("a100_40", 39.4, 312, 300),
        Device("a100_80", 79.2, 312, 300),
        Device("h100", 79.1, 989, 450),
        Device("h200", 139.8, 989, 450),
        Device("b200", 178.4, 2250, 900),
    )
}


def this_device(world: World, width: int, dtype: torch.dtype) -> Device:
    """The device of this process; the speed of its products is probed, at that width."""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tflops = probed_tflops(world.device, width, dtype)
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        return Device(properties.name, properties.total_memory / GIB, tflops, link_gb_s=25)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / num_local
    return Device(
        world.device.type,
        memory_gib,
        tflops,
        link_gb_s=1,
        context_gib=process_bytes() / GIB,
        is_cuda=False,
    )


def probed_tflops(device: torch.device, width: int, dtype: torch.dtype) -> float:
    """TFLOP/s of [1024, D] x [D, 4 D] here, the fastest of the tries of 0.3 s."""
    x = torch.ones(PROBE_ROWS, width, device=device, dtype=dtype)
    weight = torch.ones(4 * width, width, device=device, dtype=dtype)

    def seconds() -> float:
        if device.type == "cpu":  # of this process alone, whatever else the machine is doing
            return time.process_time() / torch.get_num_threads()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # sync: the product is what is measured
        return time.perf_counter()

    best_s, ends_at = float("inf"), time.monotonic() + PROBE_S
    while time.monotonic() < ends_at or best_s == float("inf"):
        started_at = seconds()
        product(x, weight)
        best_s = min(best_s, max(1e-6, seconds() - started_at))
    return 8 * PROBE_ROWS * width**2 / best_s / 1e12


def process_bytes() -> int:
    """Memory of this process now: libraries, mostly. 0 where the kernel does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
