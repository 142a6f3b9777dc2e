"""`Replicas`: each snapshot is sent to another node's memory as well, while the training goes on.

    rank r ── its part ──▶ rank r + d        d: the ranks of a node, so that it's always another node's

A node that is lost takes its ranks' slots with it, and the next node has what was in them. All ranks send the same
snapshots: before the next one is taken, the one before has been sent, and whoever takes it after the next step knows
that all others had come so far. So of the two newest, one is there whole, whenever a node is lost.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from dtrain.checkpoint.sending import mapped, receive, send, send_end
from dtrain.checkpoint.slots import Slots, Snapshot
from dtrain.errors import Damaged

_FIELDS = ("epoch", "generation", "number", "step", "rank", "world_size", "size")
_FOREVER = timedelta(days=365)


class Replicas:
    """Sends one rank's snapshots and receives another's, in one generation. To be made by all ranks.

    :param slots: with room for them.
    :param local_world_size: how many ranks this node has; it should be as many on all.
    :param say: told, once, if there is no memory for them.
    """

    def __init__(self, slots: Slots, local_world_size: int, say: Callable[[str], None]) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        sizes = [0] * world_size
        dist.all_gather_object(sizes, local_world_size)
        distance = max(sizes)  # all take the same
        self._slots = slots
        self._to, self._from = (rank + distance) % world_size, (rank - distance) % world_size
        # Of its own: whoever waits for the next snapshot waits for as long as it takes.
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._asked: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._sent = threading.Event()
        self._sent.set()
        self._error: Exception | None = None
        self._arriving = threading.Lock()
        self._dropped = False
        self._say = say
        self._said = False
        self._threads = [
            threading.Thread(target=work, name=f"dtrain{work.__name__.replace('_', '-')}", daemon=True)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, snapshot: Snapshot) -> None:
        """Send it. Nobody may write to its slot before `wait` has returned."""
        if self._threads[0].is_alive():
            self._sent.clear()
            self._asked.put(snapshot)

    def wait(self) -> None:
        """Wait until the last one is sent. :raises Exception: it couldn't be."""
        self._sent.wait()
        if self._error is not None:
            raise self._error

    def drop(self) -> None:
        """What is on its way is worth nothing any more."""
        with self._arriving:
            self._dropped = True

    def close(self) -> None:
        """At the end of the training, on all ranks. What is taken later isn't sent."""
        self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        try:
            while snapshot := self._asked.get():
                send(snapshot.path, [getattr(snapshot, name) for name in _FIELDS], self._to, self._group)
                self._sent.set()
            send_end(len(_FIELDS), self._to, self._group)
        except Exception as error:  # the other one has died, most often
            self._error = error
            self._sent.set()

    def _receive(self) -> None:
        with contextlib.suppress(RuntimeError):  # the other one has died, which the training notices as well
            while True:
                try:
                    about = receive(self._room, len(_FIELDS), self._from, self._group)
                except Damaged as error:
                    self._say(f"another rank's snapshot was damaged on its way: {error}")
                    continue
                except OSError as error:
                    if not self._said:
                        self._said = True
                        self._say(f"no memory for another rank's snapshot: {error}")
                    continue
                if about is None:
                    return
                for name, value in zip(_FIELDS, about, strict=True):
                    setattr(self._slot, name, value)
                with self._arriving:
                    self._slot.whole = not self._dropped

    def _room(self, length: int) -> torch.Tensor:
        """In the slot that is the least needed. It is chosen when something comes: a restore may have changed it."""
        index = self._slots.oldest(self._slots.replicas)
        self._slot = self._slots.board.slots[index]
        self._slot.whole = 0
        return mapped(self._slots.in_memory(index), length, make=True)
