"""Slots: memory of a machine for the snapshots of one of its ranks, shared by the processes that work for that rank.

Each slot is a file in memory (memfd), which has no name, so that nothing of it can be left behind, and no limit but the
machine's memory. It holds a shard file, byte for byte as it will lie in storage, and behind it, as JSON, what there is
to know about it. It outlives the trainer, and where there is a keeper (see `elastic.keeper`), the supervisor as well.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OWN, OWN_TO_SEND, REPLICAS = 2, 4, 2
"""Slots for a rank's own snapshots: one that is whole, and the next. Where they are sent, the one before these as well,
until all ranks have sent the newer one, and another one, as a save may hold any of them. And for another rank's."""


class _Slot(ctypes.Structure):
    _fields_ = (
        ("whole", ctypes.c_int64),
        ("epoch", ctypes.c_int64),
        ("generation", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("world_size", ctypes.c_int64),
        ("size", ctypes.c_int64),
    )


class Board(ctypes.Structure):
    """What the processes of one rank know of its slots, in memory that they share.

    slots: what each holds; `whole` is 0 while it is written to
    own: how many are for snapshots of this rank; the rest is for those of another one
    saving: the number of the save that was asked for and whose outcome wasn't told yet; 0 if there is none
    saving_generation: the generation that asked for it
    asked: the number of the last save that the saver has read of
    asked_generation: the generation that asked for it
    held: 1 + the slot that is being saved, which nobody may write to; 0 if none
    committed: the step of the last commit
    epoch: the one that this rank's saver has claimed; 0 before. A saver that takes another one's place claims anew
    stamp: the epoch that the trainers know of, the same on all ranks: what they take bears it
    group: tells it from any other
    place: that the snapshot is being saved to, see `Saver`
    """

    _fields_ = (
        ("slots", _Slot * (OWN_TO_SEND + REPLICAS)),
        ("own", ctypes.c_int64),
        ("saving", ctypes.c_int64),
        ("saving_generation", ctypes.c_int64),
        ("asked", ctypes.c_int64),
        ("asked_generation", ctypes.c_int64),
        ("held", ctypes.c_int64),
        ("committed", ctypes.c_int64),
        ("epoch", ctypes.c_int64),
        ("stamp", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("place", ctypes.c_int64),
    )

    own: int
    saving: int
    saving_generation: int
    asked: int
    asked_generation: int
    held: int
    committed: int
    epoch: int
    stamp: int
    group: int
    place: int


Key = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One rank's part of a snapshot that is whole."""

    epoch: int
    generation: int
    number: int
    """Which one of its generation, beginning at 1; equal on all ranks."""
    step: int
    rank: int
    """Whose part it is, of the group that took it, and
    """
    world_size: int
    """how many there were."""
    slot: int
    path: str
    """Where the processes of this machine can open it."""
    size: int
    """Of the shard file; what is known about it comes behind."""

    @property
    def key(self) -> Key:
        """Tells snapshots apart: equal for what ranks have taken together, and the newest is the largest."""
        return self.epoch, self.generation, self.number, self.step

    def meta(self) -> dict[str, Any]:
        """What is known about it: see `Snapshots.take`."""
        with open(self.path, "rb") as file:
            file.seek(self.size)
            meta: dict[str, Any] = json.loads(file.read())
        return meta


class Slots:
    """Made by a supervisor; its children inherit it.

    :param replicate: have room for another rank's snapshots as well.
    :param files: of an earlier supervisor's slots, whose snapshots are to be had still.
    """

    def __init__(self, *, replicate: bool = False, files: Sequence[int] = ()) -> None:
        self._owner = os.getpid()
        if files:
            board, *self._memory = files
        else:
            board = os.memfd_create("dtrain-board", os.MFD_CLOEXEC)
            os.ftruncate(board, mmap.PAGESIZE)
            count = OWN_TO_SEND + REPLICAS if replicate else OWN
            self._memory = [os.memfd_create(f"dtrain-slot-{index}", os.MFD_CLOEXEC) for index in range(count)]
        self.files = [board, *self._memory]
        self.board = Board.from_buffer(mmap.mmap(board, mmap.PAGESIZE))
        if files:  # what was under way has ended with those who were at it
            for name in (
                "saving",
                "saving_generation",
                "asked",
                "asked_generation",
                "held",
                "committed",
                "epoch",
                "stamp",
            ):
                setattr(self.board, name, 0)
        else:
            self.board.own = OWN_TO_SEND if replicate else OWN
        self.board.group = secrets.randbits(62)

    @property
    def own(self) -> range:
        return range(self.board.own)

    @property
    def replicas(self) -> range:
        """Those for another rank's snapshots."""
        return range(self.board.own, len(self._memory))

    def in_memory(self, index: int) -> str:
        """A path by which processes of this machine, and of this user, can open a slot."""
        return f"/proc/{self._owner}/fd/{self._memory[index]}"

    def keep(self, key: Key | None) -> None:
        """Forget all snapshots but one, after which nobody can want them any more."""
        for found in self.whole() + self.whole(replicas=True):
            if found.key != key:
                self.board.slots[found.slot].whole = 0

    def oldest(self, indices: Sequence[int]) -> int:
        """Which of these is the least needed."""
        slots = self.board.slots
        return min(indices, key=lambda i: (slots[i].whole, slots[i].epoch, slots[i].generation, slots[i].number))

    def whole(self, *, replicas: bool = False) -> list[Snapshot]:
        """The whole snapshots that lie in memory, oldest first."""
        found = [self.snapshot(index) for index in (self.replicas if replicas else self.own)]
        return sorted((f for f in found if self.board.slots[f.slot].whole), key=lambda snapshot: snapshot.key)

    def snapshot(self, index: int) -> Snapshot:
        """What a slot holds."""
        slot = self.board.slots[index]
        return Snapshot(
            epoch=slot.epoch,
            generation=slot.generation,
            number=slot.number,
            step=slot.step,
            rank=slot.rank,
            world_size=slot.world_size,
            slot=index,
            path=self.in_memory(index),
            size=slot.size,
        )
