"""A copy of a run's tensors in host memory that another process writes to the disk.

The memory is a file without a name (memfd, Linux): its descriptor is what the processes share.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from training.host_state import local_part

ALIGNMENT = 64  # bytes
State = Mapping[str, Mapping[str, Tensor]]  # by folder and name


@dataclass(frozen=True, slots=True)
class Piece:
    """Where this process's part of a tensor lies in the copy."""

    folder: str
    name: str
    dtype: str
    shape: list[int]  # of the part
    whole: list[int]  # of the tensor
    mesh: list[int]  # sizes of the mesh of ranks that it is spread over; none: it is not
    sharded_dims: list[int | None]  # for each dimension of the mesh; None: replicated over it
    start: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def pieces_of(state: State) -> list[Piece]:
    """How the tensors of a state lie in a copy of it."""
    pieces, start = [], 0
    for folder, tensors in state.items():
        for name, tensor in tensors.items():
            is_spread = isinstance(tensor, DTensor)
            piece = Piece(
                folder=folder,
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=list(local_part(tensor).shape),
                whole=list(tensor.shape),
                mesh=list(tensor.device_mesh.shape) if is_spread else [],
                sharded_dims=[_sharded_dim(each) for each in tensor.placements]
                if is_spread
                else [],
                start=start,
            )
            pieces.append(piece)
            start += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
    return pieces


def _sharded_dim(placement: Placement) -> int | None:
    assert type(placement) in (Shard, Replicate), placement
    return placement.dim if isinstance(placement, Shard) else None


def num_bytes_of(pieces: list[Piece]) -> int:
    """Of a copy."""
    return max((piece.start + piece.num_bytes for piece in pieces), default=0) or 1


class HostCopy:
    """Memory for the tensors of a state; two processes that hold it see the same values."""

    def __init__(self, pieces: list[Piece], descriptor: int) -> None:
        self.pieces = pieces
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, num_bytes_of(pieces))

    @classmethod
    def allocated(cls, pieces: list[Piece]) -> HostCopy:
        """Its pages are taken when they are first written, or by `reserve`."""
        descriptor = os.memfd_create("checkpoint")
        os.ftruncate(descriptor, num_bytes_of(pieces))
        return cls(pieces, descriptor)

    def reserve(self) -> None:
        """Takes all of the memory now, so that the first copy need not; OSError: too little."""
        os.posix_fallocate(self.descriptor, 0, num_bytes_of(self.pieces))

    def fill(self, state: State) -> None:
        """Copies the values of all tensors, whatever device they are on."""
        assert pieces_of(state) == self.pieces, "the run has other tensors than when it began"
        for piece in self.pieces:
            self._part(piece).copy_(local_part(state[piece.folder][piece.name]))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors, not copied again: spread over the ranks of this process group, if any."""
        state: dict[str, dict[str, Tensor]] = {}
        sizes = {tuple(piece.mesh) for piece in self.pieces if piece.mesh}
        meshes = {each: init_device_mesh("cpu", each) for each in sizes if dist.is_initialized()}
        for piece in self.pieces:
            part, mesh = self._part(piece), meshes.get(tuple(piece.mesh))
            state.setdefault(piece.folder, {})[piece.name] = (
                _on(mesh, part, piece) if mesh else part
            )
        return state

    def close(self) -> None:
        """Gives the memory back; no tensor of it may be in use."""
        self._memory.close()
        os.close(self.descriptor)

    def _part(self, piece: Piece) -> Tensor:
        dtype = getattr(torch, piece.dtype)
        if not piece.num_bytes:
            return torch.empty(piece.shape, dtype=dtype)
        count = math.prod(piece.shape)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=piece.start)
        return flat.view(piece.shape)


def _on(mesh: DeviceMesh, part: Tensor, piece: Piece) -> Tensor:
    strides = torch.empty(piece.whole, device="meta").stride()
    return DTensor.from_local(
        part,
        mesh,
        [Replicate() if dim is None else Shard(dim) for dim in piece.sharded_dims],
        run_check=False,
        shape=torch.Size(piece.whole),
        stride=strides,
    )


def pieces_from(records: list[dict[str, Any]]) -> list[Piece]:
    """What `asdict` made of pieces."""
    return [Piece(**record) for record in records]


def records_of(pieces: list[Piece]) -> list[dict[str, Any]]:
    """For another process, as JSON."""
    return [asdict(piece) for piece in pieces]
