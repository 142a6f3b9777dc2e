"""Snapshots: the state copied into shard files in memory, which is all that holds up a step.

    supervisor      makes two slots, before anything is forked: files in memory (memfd), which have no name, so that
                    nothing of them can be left behind, and no limit but the machine's memory
      ├─ trainer    copies its tensors into one of them: `Snapshots.take`
      └─ saver      writes a slot to storage, while the next snapshots go into the other (see `saver`)

A slot holds this rank's shard file, byte for byte as it will lie in storage, and behind it, as JSON, what there is to
know about it. It survives the trainer: the next one starts from the newest snapshot that all ranks have (see
`manager`). What is being saved is not written to, and the newest whole snapshot only where there is no other way.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.copying import copy
from dtrain.checkpoint.format import digest, json_text, tensors_to_json
from dtrain.checkpoint.layout import Layout
from dtrain.checkpoint.machine import available_bytes, no_collection
from dtrain.checkpoint.plan import local_items, local_part
from dtrain.checkpoint.tree import dtype_name, encode, flatten

SLOTS = 2
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)
_SPARE_BYTES = 256 << 20
"""Memory that is left to everybody else."""


class _Slot(ctypes.Structure):
    _fields_ = (
        ("whole", ctypes.c_int64),
        ("generation", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("step", ctypes.c_int64),
        ("size", ctypes.c_int64),
    )


class Board(ctypes.Structure):
    """What the processes of one rank know of its slots, in memory that they share.

    slots: what each holds; `whole` is 0 while it is written to
    saving: the number of the save that was asked for and whose outcome wasn't told yet; 0 if there is none
    saving_generation: the generation that asked for it
    asked: the number of the last save that the saver has read of
    asked_generation: the generation that asked for it
    held: 1 + the slot that is being saved, which nobody may write to; 0 if none
    committed: the step of the last commit
    epoch: the one that this group of savers claimed; 0 before
    group: tells it from any other
    place: that the snapshot is being saved to, see `Saver`
    """

    _fields_ = (
        ("slots", _Slot * SLOTS),
        ("saving", ctypes.c_int64),
        ("saving_generation", ctypes.c_int64),
        ("asked", ctypes.c_int64),
        ("asked_generation", ctypes.c_int64),
        ("held", ctypes.c_int64),
        ("committed", ctypes.c_int64),
        ("epoch", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("place", ctypes.c_int64),
    )

    saving: int
    saving_generation: int
    asked: int
    asked_generation: int
    held: int
    committed: int
    epoch: int
    group: int
    place: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One rank's part of a snapshot that is whole."""

    generation: int
    number: int
    """Which one of its generation, beginning at 1; equal on all ranks."""
    step: int
    slot: int
    path: str
    """Where the processes of this machine can open it."""
    size: int
    """Of the shard file; what is known about it comes behind."""

    @property
    def key(self) -> tuple[int, int, int]:
        """Tells snapshots apart: equal for what ranks have taken together, and the newest is the largest."""
        return self.generation, self.number, self.step

    def meta(self) -> dict[str, Any]:
        """What is known about it: see `Snapshots.take`."""
        with open(self.path, "rb") as file:
            file.seek(self.size)
            meta: dict[str, Any] = json.loads(file.read())
        return meta


class Slots:
    """Made once by each supervisor; its children inherit it."""

    def __init__(self) -> None:
        self.board = Board.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))
        self.board.group = secrets.randbits(62)
        self._owner = os.getpid()
        self._memory = [os.memfd_create(f"dtrain-slot-{index}", os.MFD_CLOEXEC) for index in range(SLOTS)]

    def in_memory(self, index: int) -> str:
        """A path by which processes of this machine, and of this user, can open a slot."""
        return f"/proc/{self._owner}/fd/{self._memory[index]}"

    def keep(self, chosen: Snapshot | None) -> None:
        """Forget all snapshots but one, after which nobody can want them any more."""
        for slot in self.board.slots:
            if chosen is None or (slot.generation, slot.number) != (chosen.generation, chosen.number):
                slot.whole = 0

    def whole(self) -> list[Snapshot]:
        """The whole snapshots that lie in memory, oldest first."""
        found = [
            Snapshot(
                generation=slot.generation,
                number=slot.number,
                step=slot.step,
                slot=index,
                path=self.in_memory(index),
                size=slot.size,
            )
            for index, slot in enumerate(self.board.slots)
            if slot.whole
        ]
        return sorted(found, key=lambda snapshot: (snapshot.generation, snapshot.number))


class Snapshots:
    """Takes one rank's snapshots, in one generation.

    :param local_world_size: how many ranks share this machine's memory.
    :param spill: a folder on a disk, for where memory is too small.
    :param say: told so, once.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        rank: int,
        world_size: int,
        local_world_size: int,
        generation: int,
        spill: str,
        say: Callable[[str], None],
    ) -> None:
        self._slots = slots
        self._board = slots.board
        self._rank = rank
        self._world_size = world_size
        self._local_world_size = local_world_size
        self._generation = generation
        self._spill = spill
        self._say = say
        self._number = 0
        self._known: tuple[Any, ...] = ()
        """What the layout depends on: names, and what is known of each tensor."""
        self._layout = Layout([])
        self._shapes = ""
        self._mapped: list[_Mapped | None] = [None] * SLOTS
        self._in_memory = True
        self._preparing: threading.Thread | None = None
        self._pending: tuple[torch.cuda.Event, Callable[[], None]] | None = None

    @no_collection()  # it would fall into what holds up the training
    def take(
        self, tree: Mapping[str, Any], step: int, steady: Collection[str], then: Callable[[Snapshot], None]
    ) -> None:
        """Copy the state. On a GPU the copy is only begun: `complete` waits for it.

        :param tree: the state; its plain values are equal on all ranks.
        :param steady: names of the tensors that nothing but the optimizer changes.
        :param then: called when the snapshot is whole.
        """
        self.complete()
        tensors: dict[str, torch.Tensor] = {}
        texts = {name: json_text(encode(value, name, tensors)) for name, value in tree.items()}
        self._lay_out(tree, tensors)
        index = self._choose()
        slot = self._board.slots[index]
        slot.whole = 0  # from here on nobody restores it: laying it out anew writes to it as well
        mapped = self._map(index)
        names = [place.name for place in self._layout.places]
        sources = [local_part(tensors[name]) for name in names]
        threads = len(os.sched_getaffinity(0)) // self._local_world_size
        copied = copy(mapped.views, sources, [name in steady for name in names], threads)
        self._number += 1
        slot.generation, slot.number, slot.step, slot.size = self._generation, self._number, step, self._layout.size
        mapped.write_meta(self._meta(texts, step))
        snapshot = Snapshot(
            generation=self._generation,
            number=self._number,
            step=step,
            slot=index,
            path=mapped.path,
            size=self._layout.size,
        )

        def publish() -> None:
            slot.whole = self._in_memory  # what lies on the disk is this trainer's alone
            then(snapshot)

        if copied is None:
            publish()
        else:
            self._pending = copied, publish

    def complete(self) -> None:
        """Wait until the tensors may change again: before the optimizer's next step, at the latest."""
        if self._pending is not None:
            (copied, publish), self._pending = self._pending, None
            copied.synchronize()
            publish()

    def _meta(self, texts: Mapping[str, str], step: int) -> dict[str, Any]:
        return {
            "step": step,
            "rank": self._rank,
            "world_size": self._world_size,
            "layout": self._layout.digest,
            "shapes": self._shapes,
            "size": self._layout.size,
            "items": self._layout.items,
            "tensors": self._layout.tensors,
            "objects": {name: digest(text.encode()) for name, text in texts.items()},
            "tree": "{" + ",".join(f"{json_text(name)}:{text}" for name, text in texts.items()) + "}",
        }

    def _lay_out(self, tree: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Plan and lay out anew, if the tensors of the tree aren't those of the last time."""
        known = (
            list(tensors),
            [
                (t.dtype, t.shape, t.device_mesh, t.placements) if isinstance(t, DTensor) else (t.dtype, t.shape)
                for t in tensors.values()
            ],
        )
        if known == self._known:
            return
        flatten(tree)  # raises where two values would have one name
        self._layout = Layout(local_items(tensors, self._rank, self._world_size))
        shapes = {name: (dtype_name(tensors[name].dtype), tensors[name].shape) for name in sorted(tensors)}
        self._shapes = digest(tensors_to_json(shapes).encode())
        self._mapped = [None] * SLOTS
        self._in_memory = self._fits()
        self._known = known  # at the end: what was raised before is raised the next time as well

    def _choose(self) -> int:
        """The slot that is the least needed, and isn't held by the saver: of two, one is always free."""
        free = [index for index in range(SLOTS) if index != self._board.held - 1]
        slots = self._board.slots
        return min(free, key=lambda index: (slots[index].whole, slots[index].generation, slots[index].number))

    def _map(self, index: int) -> _Mapped:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        mapped = self._mapped[index]
        if mapped is None:
            if self._in_memory:
                path = self._slots.in_memory(index)
                mapped = _Mapped(Path(path).open("r+b", buffering=0), path, self._layout)  # noqa: SIM115  # it is kept
            else:
                file = tempfile.TemporaryFile(dir=self._spill, buffering=0)  # noqa: SIM115
                mapped = _Mapped(file, f"/proc/{os.getpid()}/fd/{file.fileno()}", self._layout)
            self._mapped[index] = mapped
            self._prepare((index + 1) % SLOTS)
        return mapped

    def _prepare(self, index: int) -> None:
        """Have an unused slot laid out by a thread, since the first touch of memory takes many times a copy."""
        unused = not self._board.slots[index].whole and self._board.held - 1 != index
        if self._in_memory and unused and self._mapped[index] is None:
            path, layout, mapped = self._slots.in_memory(index), self._layout, self._mapped

            def work() -> None:
                prepared = _Mapped(Path(path).open("r+b", buffering=0), path, layout)  # noqa: SIM115
                prepared.touch()
                mapped[index] = prepared

            self._preparing = threading.Thread(target=work, daemon=True)
            self._preparing.start()

    def _fits(self) -> bool:
        """Whether all slots fit into this machine's memory."""
        size = SLOTS * self._layout.size
        have = sum(os.stat(self._slots.in_memory(index)).st_size for index in range(SLOTS))
        free = available_bytes() - _SPARE_BYTES
        if max(0, size - have) * self._local_world_size <= free:
            return True
        self._say(
            f"two snapshots take {size / 2**20:,.0f} MiB of memory for each of {self._local_world_size} ranks here, "
            f"but there are only {max(0, free) / 2**20:,.0f} MiB in all: checkpoints go through files in {self._spill} "
            "instead, and a process that dies costs the steps since the last checkpoint"
        )
        return False


class _Mapped:
    """A slot in this process's memory, laid out.

    :param path: by which other processes can open it.
    """

    def __init__(self, file: IO[bytes], path: str, layout: Layout) -> None:
        self._file = file
        self._size = layout.size
        self.path = path
        self.views: list[torch.Tensor] = []
        if layout.size == 0:
            return
        # All of it now, or an error: a hole that can't be filled later kills the process that writes there.
        os.posix_fallocate(file.fileno(), 0, layout.size)
        mapping = mmap.mmap(file.fileno(), layout.size)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        layout.write_frames(memoryview(mapping))
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        if torch.cuda.is_initialized():
            # Pinned, so that a GPU can write into it while the CPU goes on. Where that fails, it's only slower.
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), layout.size, 0)
        self._start = memory.data_ptr()
        self.views = layout.views(memory)

    def touch(self) -> None:
        """Have all of the memory there, and in this process's page table."""
        # Unlike mmap.madvise, ctypes lets the other threads run. An old kernel doesn't know this, and it's no loss.
        if self._size:
            _libc.madvise(ctypes.c_void_p(self._start), ctypes.c_size_t(self._size), _MADV_POPULATE_WRITE)

    def write_meta(self, meta: dict[str, Any]) -> None:
        os.ftruncate(self._file.fileno(), self._size)
        os.pwrite(self._file.fileno(), json_text(meta).encode(), self._size)
