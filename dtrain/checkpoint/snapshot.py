"""Snapshots: the state copied into shard files in memory, which is all that holds up a step.

    supervisor      makes two slots, before anything is forked (see `slots`)
      ├─ trainer    copies its tensors into one of them: `Snapshots.take`
      └─ saver      writes a slot to storage, while the next snapshots go into the other (see `saver`)

They survive the trainer: the next one starts from the newest snapshot of which all parts can be had (see `memory`).
What is being saved is not written to, and the newest whole snapshot only where there is no other way.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.copying import copy
from dtrain.checkpoint.format import digest, json_text, tensors_to_json
from dtrain.checkpoint.layout import Layout
from dtrain.checkpoint.machine import free_bytes, no_collection
from dtrain.checkpoint.plan import local_items, local_part
from dtrain.checkpoint.replicas import Replicas
from dtrain.checkpoint.slots import Slots, Snapshot
from dtrain.checkpoint.tree import dtype_name, encode, flatten

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


class Snapshots:
    """Takes one rank's snapshots, in one generation.

    :param local_world_size: how many ranks share this machine's memory.
    :param spill: a folder on a disk, for where memory is too small.
    :param say: told so, once.
    :param replicas: sends what is taken to another node.
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
        replicas: Replicas | None = None,
    ) -> None:
        self._slots = slots
        self._board = slots.board
        self._rank = rank
        self._world_size = world_size
        self._local_world_size = local_world_size
        self._generation = generation
        self._spill = spill
        self._say = say
        self._replicas = replicas
        self._number = 0
        self._known: tuple[Any, ...] = ()
        """What the layout depends on: names, and what is known of each tensor."""
        self._layout = Layout([])
        self._shapes = ""
        self._mapped: list[_Mapped | None] = [None for _ in slots.own]
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
        if self._replicas is not None:
            self._replicas.wait()
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
        slot.epoch, slot.generation, slot.number = self._board.stamp, self._generation, self._number
        slot.step, slot.rank, slot.world_size, slot.size = step, self._rank, self._world_size, self._layout.size
        mapped.write_meta(self._meta(texts, step))
        snapshot = replace(self._slots.snapshot(index), path=mapped.path)

        def publish() -> None:
            slot.whole = self._in_memory  # what lies on the disk is this trainer's alone
            if self._replicas is not None and self._in_memory:
                self._replicas.begin(snapshot)
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

    def drop(self) -> None:
        """Let none be gone on from, nor those that are still arriving."""
        if self._replicas is not None:
            self._replicas.drop()
        self._slots.keep(None)

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
        for mapped in filter(None, self._mapped):
            mapped.unpin()
        self._mapped = [None for _ in self._slots.own]
        self._in_memory = self._fits()
        self._known = known  # at the end: what was raised before is raised the next time as well

    def _choose(self) -> int:
        """The slot that is the least needed, and isn't held by the saver: of two, one is always free."""
        return self._slots.oldest([index for index in self._slots.own if index != self._board.held - 1])

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
            self._prepare((index + 1) % len(self._mapped))
        return mapped

    def _prepare(self, index: int) -> None:
        """Have an unused slot laid out by a thread, since the first touch of memory takes many times a copy."""
        unused = not self._board.slots[index].whole and self._board.held - 1 != index
        if self._in_memory and unused and self._mapped[index] is None:
            path, layout, mapped = self._slots.in_memory(index), self._layout, self._mapped
            gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

            def work() -> None:
                if gpu is not None:  # each thread has a device of its own, and would use that of another rank
                    torch.cuda.set_device(gpu)
                prepared = _Mapped(Path(path).open("r+b", buffering=0), path, layout)  # noqa: SIM115
                prepared.touch()
                mapped[index] = prepared

            self._preparing = threading.Thread(target=work, daemon=True)
            self._preparing.start()

    def _fits(self) -> bool:
        """Whether all slots fit into this machine's memory."""
        slots = [*self._slots.own, *(self._slots.replicas if self._replicas is not None else ())]
        size = len(slots) * self._layout.size
        have = sum(os.stat(self._slots.in_memory(index)).st_size for index in slots)
        free = free_bytes()
        if max(0, size - have) * self._local_world_size <= free:
            return True
        self._say(
            f"{len(slots)} snapshots take {size / 2**20:,.0f} MiB of memory for each of {self._local_world_size} ranks "
            f"here, but there are only {max(0, free) / 2**20:,.0f} MiB in all: checkpoints go through files in "
            f"{self._spill} instead, and a process that dies costs the steps since the last checkpoint"
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
        self._pinned = False
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
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), layout.size, 0)) == 0
        self._start = memory.data_ptr()
        self.views = layout.views(memory)

    def unpin(self) -> None:
        """Before it is dropped: what is mapped next may lie at the same address."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._start)
            self._pinned = False

    def touch(self) -> None:
        """Have all of the memory there, and in this process's page table."""
        # Unlike mmap.madvise, ctypes lets the other threads run. An old kernel doesn't know this, and it's no loss.
        if self._size:
            _libc.madvise(ctypes.c_void_p(self._start), ctypes.c_size_t(self._size), _MADV_POPULATE_WRITE)

    def write_meta(self, meta: dict[str, Any]) -> None:
        os.ftruncate(self._file.fileno(), self._size)
        os.pwrite(self._file.fileno(), json_text(meta).encode(), self._size)
