"""Pieces of stored tensors that lie on another node's disk: a rank that sees the file sends them.

It does not matter which rank wrote a file, nor how many ranks there were: whoever lacks a piece
asks, and the lowest rank that has it answers. Nothing is written to a disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.distributed import World


class StoredPiece(NamedTuple):
    """Where a tensor, or a part of one, lies in a folder."""

    file: str
    start: int  # bytes
    length: int


def exchange(
    folder: Path, lacking: Iterable[StoredPiece], use: Callable[[StoredPiece, bytes], None]
) -> None:
    """Calls `use` with each piece that this rank lacks; every rank calls it, one piece at a time.

    An error of `use` is raised when all are sent, so that nobody waits for this rank. OSError on
    every rank where nobody has a file, or who has it cannot read it.
    """
    world, own = _world(), set(lacking)
    asked = torch.zeros(world.size, dtype=torch.int64)
    asked[world.rank] = len(own)
    lists = [
        json.loads(world.broadcast(json.dumps(sorted(own)), rank))
        for rank, count in enumerate(world.sum(asked).tolist())
        if count
    ]
    wanted = sorted({StoredPiece(*each) for pieces in lists for each in pieces})
    if not wanted:
        return
    owners = _owners(folder, sorted({piece.file for piece in wanted}), world)
    error: Exception | None = None
    for piece in wanted:
        content = world.broadcast_bytes(_read(folder, piece, world, owners), owners[piece.file])
        if len(content) != piece.length:
            raise OSError(f"rank {owners[piece.file]} cannot read {folder / piece.file}")
        if piece in own and error is None:
            try:
                use(piece, content)
            except Exception as caught:  # of any kind: it is raised below
                error = caught
    if error:
        raise error


def is_there(path: Path) -> bool:
    """Whether this rank sees a file; never an error, for which others would have to wait."""
    try:
        return path.exists()
    except OSError:  # a network file system that has gone away, say
        return False


def _owners(folder: Path, files: list[str], world: World) -> dict[str, int]:
    """For each file, the lowest rank that sees it."""
    sees = torch.zeros(world.size, len(files), dtype=torch.int32)
    sees[world.rank] = torch.tensor([is_there(folder / file) for file in files])
    seen = world.sum(sees) > 0
    nobody = [file for file, column in zip(files, seen.T, strict=True) if not column.any()]
    if nobody:
        raise OSError(f"{folder / nobody[0]} is on no disk ({len(nobody)} such files)")
    return dict(zip(files, seen.int().argmax(dim=0).tolist(), strict=True))


def _read(folder: Path, piece: StoredPiece, world: World, owners: dict[str, int]) -> bytes:
    """The piece where this rank is the one to send it; b"": it is not, or it cannot."""
    if owners[piece.file] != world.rank:
        return b""
    try:
        with (folder / piece.file).open("rb") as file:
            file.seek(piece.start)
            return file.read(piece.length)
    except OSError:
        return b""


def _world() -> World:
    """The ranks of this process group, and what they exchange tensors on."""
    is_nccl = "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)
