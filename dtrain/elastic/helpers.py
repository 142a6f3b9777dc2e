"""The processes that a supervisor has beside its trainer; each is replaced when it dies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection

from dtrain.checkpoint.channel import Client, Remote, send, serve
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Slots
from dtrain.config import Config
from dtrain.elastic.failure import described
from dtrain.elastic.generation import Group
from dtrain.elastic.page import Page
from dtrain.elastic.process import Child, ignore_ending
from dtrain.observe.events import Events

Fork = Callable[[Callable[[], int], str], Child]

_SAVERS_NICENESS = 15
"""The training goes first."""
_MOST_DEATHS = 5
"""Of savers, within a minute."""
_LAST_SAVE_WAIT_S = 2.0
"""When a run ends in the middle of a step, the newest snapshot is saved, if all ranks' savers come to it within so
long. Not all do where torchrun ends the processes because one of them has died."""


class SaverProcess:
    """Writes snapshots to storage; see `checkpoint.saver`."""

    def __init__(self, config: Config, group: Group, slots: Slots, events: Events, fork: Fork) -> None:
        self._config = config
        self._group = group
        self._slots = slots
        self._events = events
        self._fork = fork
        self._trainers_end, self._savers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._deaths: list[float] = []
        self._child = self._started()

    def _started(self) -> Child:
        return self._fork(self._work, "dtrain-saver")

    def _work(self) -> int:
        ignore_ending()
        os.nice(_SAVERS_NICENESS)
        place = self._group.placement
        saver = Saver.of(self._config, self._group.savers_store, place.rank, place.world_size, self._slots)
        serve(self._savers_end, saver, self._slots.board)
        return 0

    @property
    def pidfd(self) -> int:
        return self._child.pidfd

    def client(self, generation: int) -> Client:
        """For a trainer."""
        return Remote(self._trainers_end, self._slots.board, generation)

    def replace(self) -> None:
        """Put another one in the place of one that has died.

        :raises RuntimeError: they die one after the other.
        """
        cause, rank = described(self._child.wait()), self._group.placement.rank
        self._deaths = [*self._deaths[-_MOST_DEATHS:], time.monotonic()]
        if len(self._deaths) > _MOST_DEATHS and self._deaths[-1] - self._deaths[0] < 60:
            raise RuntimeError(f"the saver of rank {rank} dies again and again ({cause})")
        self._events.warn(f"the saver of rank {rank} was {cause}; it is replaced")
        self._child = self._started()

    def over(self, generation: int) -> None:
        """Whatever a generation's trainer has asked for lies before this in the queue, and nothing of it behind."""
        send(self._trainers_end, do="over", generation=generation, rank=self._group.placement.rank)

    def save_last(self) -> None:
        """Have the newest snapshot saved."""
        send(self._trainers_end, do="last", timeout_s=_LAST_SAVE_WAIT_S)

    def end(self) -> None:
        """Let it finish what it is at. `kill` is still needed."""
        send(self._trainers_end, do="end")

    def kill(self) -> None:
        self._child.kill()


class Watcher:
    """Waits for the end of a generation on other ranks."""

    def __init__(self, fork: Fork, group: Group, generation: int) -> None:
        self._fork = fork
        self._group = group
        self._generation = generation
        self._child: Child | None = None

    def descriptors(self) -> list[int]:
        """To be polled; there is none where nobody else is."""
        if self._child is None and self._group.placement.world_size > 1:
            self._child = self._fork(self._work, "dtrain-watcher")
        return [] if self._child is None else [self._child.pidfd]

    def _work(self) -> int:
        ignore_ending()
        return self._group.watch(self._generation)

    def has_ended(self, ready: Collection[int]) -> bool:
        """Whether the generation is settled. :raises ConnectionError: torchrun's store is gone."""
        if self._child is None or self._child.pidfd not in ready:
            return False
        code, self._child = self._child.wait(), None
        if code > 0:
            raise ConnectionError("torchrun's store is gone")
        return code == 0  # else somebody has killed it: another one will be told the same

    def end(self) -> None:
        if self._child is not None:
            self._child.kill()


class Heart:
    """Beats for this node, where there are others, and watches the next one's beat."""

    def __init__(self, fork: Fork, group: Group, page: Page) -> None:
        self._fork = fork
        self._group = group
        self._page = page
        self._child = self._started()

    def _started(self) -> Child | None:
        place = self._group.placement
        return None if place.nodes == 1 or place.local_rank else self._fork(self._work, "dtrain-heart")

    def _work(self) -> int:
        ignore_ending()
        return self._group.beat(self._page)

    def descriptors(self) -> list[int]:
        """To be polled."""
        return [] if self._child is None else [self._child.pidfd]

    def look(self, ready: Collection[int]) -> None:
        """Put another one in its place, if it has died."""
        if self._child is not None and self._child.pidfd in ready:
            self._child.wait()
            self._child = self._started()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
