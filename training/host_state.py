"""Optimizer state that lies in host memory and visits the device some parameters at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

State = dict[str, Tensor]  # of one parameter, by kind


def local_part(tensor: Tensor | None) -> Tensor:
    """This rank's shard: DTensor arithmetic is slower and leaks (torchtitan#3790)."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_copies(tensor: Tensor) -> int:
    """On how many ranks each part of it lies: more than one where weights are replicated."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_replicate())


def copy_on(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of `tensor` on `device`, sharded as it is; page-locked where that speeds copies."""
    local = local_part(tensor.detach())
    is_pinned = local.device.type == "cuda" and device.type == "cpu"
    copy = torch.empty_like(local, device=device, pin_memory=is_pinned).copy_(local)
    if not isinstance(tensor, DTensor):
        return copy
    # `from_local` would move it to the device of the mesh.
    return DTensor(copy, tensor._spec, requires_grad=False)


def streamed(batches: Sequence[list[State]], device: torch.device) -> Iterator[list[State]]:
    """Copies of each batch of states on `device`, to be changed in place; they are written back.

    Batch i + 1 is copied while batch i is in use, so two are there at a time. On CUDA all copies
    are made on a stream of their own: memory that it hands out is also last used on it.
    """
    if not batches:
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copied(part: Tensor) -> Tensor:
        return part.to(device, non_blocking=True, copy=True)

    def fetch(batch: list[State]) -> tuple[list[State], torch.Event | None]:
        with torch.cuda.stream(stream):
            copies = [{kind: copied(part) for kind, part in state.items()} for state in batch]
            return copies, stream.record_event() if stream else None

    coming = fetch(batches[0])
    for index, batch in enumerate(batches):
        copies, has_arrived = coming
        if index + 1 < len(batches):
            coming = fetch(batches[index + 1])
        if has_arrived:
            torch.cuda.current_stream(device).wait_event(has_arrived)
        yield copies
        if stream:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for state, updated in zip(batch, copies, strict=True):
                for kind, part in state.items():
                    part.copy_(updated[kind], non_blocking=True)
    if stream:
        stream.synchronize()  # sync: the host may read its memory (checkpoints) from here on
