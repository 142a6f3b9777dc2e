"""Sending a rank's part of a snapshot from one machine's memory to another's, checked at its arrival."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import xxhash

from dtrain.checkpoint.machine import free_bytes
from dtrain.errors import Damaged

_PIECE_BYTES = 256 << 20


def send(path: str, about: Sequence[int], to: int, group: dist.ProcessGroup | None = None) -> None:
    """Send a file in memory, to a rank that is at `receive`.

    :param about: what there is to know about it, as whole numbers; always as many.
    """
    memory = mapped(path, os.stat(path).st_size)
    for tensor in (torch.tensor([memory.numel(), _digest(memory), *about]), *memory.split(_PIECE_BYTES)):
        dist.send(tensor, to, group=group)


def send_end(count: int, to: int, group: dist.ProcessGroup | None = None) -> None:
    """Say that nothing more comes. :param count: how many numbers `about` has."""
    dist.send(torch.zeros(2 + count, dtype=torch.int64), to, group=group)


def receive(
    room: Callable[[int], torch.Tensor], count: int, source: int, group: dist.ProcessGroup | None = None
) -> list[int] | None:
    """Receive one.

    :param room: called with the number of bytes, for where they go.
    :param count: how many numbers `about` has.
    :returns: what there is to know about it; None if nothing more comes.
    :raises Damaged: it isn't what was sent.
    :raises OSError: there was no room. What was sent has been taken from the wire all the same.
    """
    header = torch.zeros(2 + count, dtype=torch.int64)
    dist.recv(header, source, group=group)
    length, expected, *about = header.tolist()
    if not length:
        return None
    memory, problem = None, None
    try:
        memory = room(length)
    except OSError as error:
        problem = error
    for start in range(0, length, _PIECE_BYTES):
        size = min(_PIECE_BYTES, length - start)
        piece = torch.empty(size, dtype=torch.uint8) if memory is None else memory[start : start + size]
        dist.recv(piece, source, group=group)
    if problem is not None:
        raise problem
    if memory is not None and _digest(memory) != expected:
        raise Damaged(f"{length} bytes from rank {source} are not those that it sent")
    return about


def _digest(memory: torch.Tensor) -> int:
    """xxh3-64, as a signed number."""
    return xxhash.xxh3_64_intdigest(memory.numpy().data) - (1 << 63)


def mapped(path: str, length: int, *, make: bool = False) -> torch.Tensor:
    """A file in memory, as bytes.

    :param make: give it this length first.
    :raises OSError: there is no room.
    """
    with open(path, "r+b", buffering=0) as file:
        if make:
            # Where a container is at its limit, to ask for memory is answered by SIGKILL.
            if length - os.fstat(file.fileno()).st_size > (free := free_bytes()):
                raise OSError(f"{length / 2**20:,.0f} MiB are needed, and {max(0, free) / 2**20:,.0f} MiB are free")
            os.ftruncate(file.fileno(), length)
            os.posix_fallocate(file.fileno(), 0, length)
        return torch.frombuffer(mmap.mmap(file.fileno(), length), dtype=torch.uint8)
