"""Restoring from memory: the newest snapshot of which every part lies in some rank's slots, on whatever machine.

The parts may have been taken by another number of ranks, before torchrun formed the group anew, and those of a node
that is gone lie in the slots of the next one (see `replicas`). A part that is needed on another machine is sent there.
Every function is a collective operation: all ranks must reach it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dtrain.checkpoint.format import Manifest, Part
from dtrain.checkpoint.index import Indexes
from dtrain.checkpoint.machine import machine
from dtrain.checkpoint.sending import mapped, receive, send
from dtrain.checkpoint.slots import Key, Slots, Snapshot
from dtrain.checkpoint.writer import shard_name
from dtrain.errors import Damaged
from dtrain.storage.local import LocalStorage

_FOLDER = "memory"


@dataclass(frozen=True)
class Found:
    """A snapshot of which every part is there."""

    key: Key
    holders: list[dict[int, Snapshot]]
    """Of each part: the ranks that have it."""
    machines: list[str]
    """Of each rank."""

    @property
    def step(self) -> int:
        return self.key[-1]


def find(slots: Slots, counts: Callable[[Snapshot], bool]) -> Found | None:
    """The newest one; None if there is none.

    :param counts: whether one may be taken.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (machine(), slots.whole() + slots.whole(replicas=True)))
    parts: dict[Key, dict[int, dict[int, Snapshot]]] = {}
    for rank, (_, snapshots) in enumerate(gathered):
        for snapshot in filter(counts, snapshots):
            parts.setdefault(snapshot.key, {}).setdefault(snapshot.rank, {})[rank] = snapshot
    for key, of_ranks in sorted(parts.items(), reverse=True):
        world_size = next(iter(of_ranks[min(of_ranks)].values())).world_size
        if len(of_ranks) == world_size:
            return Found(key, [of_ranks[part] for part in range(world_size)], [where for where, _ in gathered])
    return None


def manifest_of(found: Found) -> Manifest:
    """:raises Exception: on this rank, if a part of its own can't be read; all come to the end of it."""
    rank = dist.get_rank()
    mine, problem = {}, None
    try:
        mine = {part: held[rank].meta() for part, held in enumerate(found.holders) if min(held) == rank}
    except Exception as error:
        problem = error
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if problem is not None:
        raise problem
    metas = {part: meta for of_rank in gathered for part, meta in of_rank.items()}
    if len(metas) < len(found.holders):
        raise OSError("a part of it can't be read on another rank")
    return Manifest.from_json(
        Manifest.join(
            [
                Part(file=shard_name(part), size=metas[part]["size"], items=metas[part]["items"], digests=b"")
                for part in range(len(found.holders))
            ],
            step=found.step,
            world_size=len(found.holders),
            tree=metas[0]["tree"],
            tensors=Indexes.merged(metas[part]["tensors"] for part in range(len(found.holders))),
            index=b"",
        )
    )


@contextlib.contextmanager
def at_hand(found: Found, needed: set[str]) -> Iterator[Storage]:
    """The parts that this rank needs, on its own machine. What was sent goes away at the end of the block.

    :param needed: files of the manifest.
    """
    rank = dist.get_rank()
    needs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(needs, [part for part in range(len(found.holders)) if shard_name(part) in needed])
    with contextlib.ExitStack() as stack:
        received: dict[int, str] = {}
        for part, source, to in _to_send(found, needs):
            if rank == source:
                send(found.holders[part][rank].path, (), to)
            elif rank == to:
                file = os.memfd_create("dtrain-received", os.MFD_CLOEXEC)
                stack.callback(os.close, file)
                path = f"/proc/{os.getpid()}/fd/{file}"
                with contextlib.suppress(Damaged, OSError):  # who needs it says so when it isn't there
                    receive(functools.partial(mapped, path, make=True), 0, source)
                    received[part] = path
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, received)
        here = [other for other, where in enumerate(found.machines) if where == found.machines[rank]]
        near = {part: held[other].path for part, held in enumerate(found.holders) for other in here if other in held}
        for other in here:
            near |= gathered[other]
        yield Storage({f"{_FOLDER}/{shard_name(part)}": path for part, path in near.items()})


def _to_send(found: Found, needs: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """Which part goes from which rank to which: once to each machine that needs it and doesn't have it."""
    for where in sorted(set(found.machines)):
        here = [rank for rank, machine in enumerate(found.machines) if machine == where]
        for part in sorted({part for rank in here for part in needs[rank]}):
            held = sorted(found.holders[part])
            if not any(rank in held for rank in here):
                yield part, held[part % len(held)], here[part % len(here)]


class Storage:
    """The parts, as a place that can be read."""

    root = _FOLDER

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
        if path not in self._files:
            raise OSError(
                f"{path} could not be sent from another machine: it was damaged on its way, or there is no room"
            )
        place = Path(self._files[path])
        LocalStorage(str(place.parent)).read_into(place.name, offset, buffers)
