"""A group of supervisors, and the generations of trainers that it lives through.

torchrun's agents keep one store for the whole job, and restarts, resized groups and leftovers all write into it. So
every group agrees on a prefix of its own, and every generation gets one below it: nobody ever reads the address of a
process that is dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from dtrain.config import Config
from dtrain.elastic.page import Page
from dtrain.elastic.placement import Placement
from dtrain.elastic.process import alive_s

_FOREVER = timedelta(days=365)
_BEAT_S = 1.0
_LOST_AFTER = 3
"""A node is gone when its beat hasn't come for so many of the next node's. These are counted, not timed: a machine that
is too busy to look in time is too busy to judge."""
_HOUR_S = 3600.0
_WORD_HOLDS_S = 60.0
"""For so long, torchrun may start processes again whose run has ended for good."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a generation ended. The first supervisor to say so decides for all."""

    kind: Literal["done", "failed", "stopped", "ended", "lost"]
    """`failed` is followed by another generation, `stopped` isn't; `ended` is by a signal; after `lost`, torchrun forms
    the group anew without a node that is gone."""
    rank: int = -1
    """The rank that failed first."""
    node: int = -1
    """The one that was lost, and
    """
    host: str = ""
    """what it's called."""
    cause: str = ""
    """One line."""
    trace: str = ""
    """The traceback, where there is one."""
    best: int = 0
    """The last step that any generation has finished."""
    stalled: int = 0
    """Generations in a row that ended without a new step."""
    at: int = 0
    """The step that they were all in, of the kind that can be passed over; 0 if there was none."""
    skipped: tuple[int, ...] = ()
    """Steps that are passed over, as they have killed several generations."""
    signal: int = 0
    """That has ended it."""
    saved: bool = False
    """The last step was saved before the end."""

    @classmethod
    def of(cls, text: str | bytes) -> Outcome:
        fields = json.loads(text)
        return cls(**fields | {"skipped": tuple(fields["skipped"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_name(config: Config) -> str:
    """What a run is called in the store."""
    return hashlib.sha256(config.dir.encode()).hexdigest()[:16]


class Group:
    """The supervisors of a job, seen by one of them.

    :param timeout_s: how long to wait for the others to arrive, in seconds.
    """

    def __init__(self, placement: Placement, timeout_s: float) -> None:
        self.placement = placement
        self._timeout = timedelta(seconds=timeout_s)
        self._store = self._connect()
        self._inbox = f"dtrain/inbox/{placement.job}"
        self._prefix = f"dtrain/{self._form()}"
        self._board = dist.PrefixStore(self._prefix, self._store)

    def _connect(self) -> dist.Store:
        # A client has no thread of its own, so a supervisor may hold one and still fork.
        address = self.placement.store
        return dist.TCPStore(*address, is_master=False, timeout=self._timeout) if address else dist.HashStore()

    def _form(self) -> str:
        """Agree with the other supervisors on a name that no group had before.

        Everybody puts a nonce of its own into a queue that rank 0 reads; rank 0 answers under that nonce, so that
        nothing that an earlier group left in the store can be taken for the answer.
        """
        place, me = self.placement, uuid.uuid4().hex
        if place.world_size == 1:
            return me
        if place.rank != 0:
            self._post({"rank": place.rank, "nonce": me})
            answer = f"dtrain/invite/{me}"
            self._store.wait([answer], self._timeout)
            name = self._store.get(answer).decode()
            self._post({"rank": place.rank, "joined": name})
            self._store.wait([f"dtrain/complete/{name}"], self._timeout)  # else those who are late would be missed
            return name
        missing = set(range(1, place.world_size))
        while missing:
            try:
                message = json.loads(self._store.queue_pop(self._inbox))
            except dist.DistStoreError as error:
                raise TimeoutError(f"ranks {sorted(missing)} did not start within {self._timeout}") from error
            if "nonce" in message:
                self._store.set(f"dtrain/invite/{message['nonce']}", me)
            elif message.get("joined") == me:
                missing.discard(int(message["rank"]))
        self._store.set(f"dtrain/complete/{me}", "")
        return me

    def _post(self, message: dict[str, object]) -> None:
        self._store.queue_push(self._inbox, json.dumps(message))

    def settle(self, generation: int, outcome: Outcome) -> Outcome:
        """Say how a generation ended, and learn who was first to say so."""
        return Outcome.of(self._board.compare_set(f"{generation}/outcome", "", outcome.to_json()))

    def finished(self, generation: int) -> bool:
        """Say that this rank's trainer has come to its end; True if it was the last one."""
        self._board.set(f"{generation}/ended/{self.placement.rank}", "")
        return self._board.add(f"{generation}/finished", 1) == self.placement.world_size

    def ended(self, generation: int) -> list[int]:
        """The ranks whose trainers have come to their end."""
        if self._board.add(f"{generation}/finished", 0) == 0:
            return []
        ranks = range(self.placement.world_size)
        return [rank for rank in ranks if self._board.check([f"{generation}/ended/{rank}"])]

    def silent(self, generation: int, report: dict[str, Any] | None) -> bool:
        """Say that this rank's trainer doesn't come any further, or that it does after all.

        :param report: where it is; None takes back what was said before.
        :returns: whether no rank's does.
        """
        if report is None:
            self._board.add(f"{generation}/silent", -1)
            return False
        self._board.set(f"{generation}/report/{self.placement.rank}", json.dumps(report))
        return self._board.add(f"{generation}/silent", 1) == self.placement.world_size

    def all_silent(self, generation: int) -> bool:
        """Whether it is so still."""
        return self._board.add(f"{generation}/silent", 0) >= self.placement.world_size

    def reports(self, generation: int) -> list[dict[str, Any]]:
        """What the ranks said last when they were silent."""
        keys = [f"{generation}/report/{rank}" for rank in range(self.placement.world_size)]
        return [json.loads(self._board.get(key)) for key in keys if self._board.check([key])]

    def outcome(self, generation: int) -> Outcome:
        """Of a generation that has been settled."""
        return Outcome.of(self._board.get(f"{generation}/outcome"))

    def ask_to_end(self, number: int, *, final: bool) -> bool:
        """Say that all are to stop after the step that they are in. :returns: whether nobody had said so before.

        :param number: of the signal that is the reason.
        :param final: nobody is to start the job again.
        """
        if final:
            self._board.set("final", "")
        asked = self._board.check(["signal"])
        self._board.compare_set("signal", "", str(number))
        return not asked

    def asked_to_end(self) -> tuple[int, bool]:
        """The signal for which somebody said so, or 0; and whether it was final."""
        if not self._board.check(["signal"]):
            return 0, False
        return int(self._board.get("signal")), self._board.check(["final"])

    def watch(self, generation: int) -> int:
        """Block until a generation is settled. For a process of its own: it takes a connection of its own.

        :returns: 0, or 1 if the store is gone.
        """
        try:
            dist.PrefixStore(self._prefix, self._connect()).wait([f"{generation}/outcome"], _FOREVER)
        except dist.DistError:
            return 1
        return 0

    def beat(self, page: Page) -> int:
        """Beat for this node once a second, watch the next node's beat, and settle any generation without it.

        For a process of its own, which outlives generations: a trainer may take its time to die.
        """
        place = self.placement
        next_node = (place.node + 1) % place.nodes
        last, silent = b"", 0
        with contextlib.suppress(dist.DistError):  # the store is gone, which `watch` says as well
            board = dist.PrefixStore(self._prefix, self._connect())
            board.set(f"host/{place.node}", socket.gethostname())
            while True:
                board.set(f"beat/{place.node}", uuid.uuid4().hex)
                time.sleep(_BEAT_S)
                beat = board.get(f"beat/{next_node}") if last or board.check([f"beat/{next_node}"]) else b""
                last, silent = beat, silent + 1 if beat == last else 0
                if silent >= _LOST_AFTER:
                    host = board.get(f"host/{next_node}").decode() if last else ""
                    name = f"node {next_node} of {place.nodes}{f' ({host})' if host else ''}"
                    cause = f"{name} has not been heard of for {silent} s"
                    lost = Outcome(kind="lost", cause=cause, node=next_node, host=host)
                    board.compare_set(f"{page.generation}/outcome", "", lost.to_json())
        return 0

    def trainers_store(self, generation: int) -> dist.Store:
        """A connection for a trainer, below the prefix of its generation."""
        return dist.PrefixStore(f"{self._prefix}/{generation}/trainers", self._connect())

    def savers_store(self) -> dist.Store:
        """A connection for a saver: savers outlive generations."""
        return dist.PrefixStore(f"{self._prefix}/savers", self._connect())

    def notes_store(self, run: str) -> dist.Store:
        """A connection for a trainer to what is remembered of a run for as long as the job's store is there."""
        return dist.PrefixStore(f"dtrain/notes/{self.placement.job}/{run}", self._connect())

    def failures(self, run: str) -> list[float]:
        """When generations have failed within the last hour, before torchrun's restarts as well: Unix times."""
        key = f"dtrain/failures/{self.placement.job}/{run}"
        times: list[float] = json.loads(self._store.get(key)) if self._store.check([key]) else []
        return [when for when in times if when > time.time() - _HOUR_S]

    def remember_failure(self, run: str) -> None:
        self._store.set(f"dtrain/failures/{self.placement.job}/{run}", json.dumps([*self.failures(run), time.time()]))

    def forget_failures(self, run: str) -> None:
        """At the end of the run: they aren't those of its next start, with a store that outlives both."""
        self._store.delete_key(f"dtrain/failures/{self.placement.job}/{run}")

    def remember_end(self, run: str, outcome: Outcome) -> None:
        """Leave word for the processes that torchrun will start in this one's place."""
        word = json.dumps([time.time(), outcome.to_json()])
        self._store.set(f"dtrain/ended/{self.placement.job}/{run}", word)

    def forget_end(self, run: str) -> None:
        """At the start of a group, all of which has looked for it: it isn't that of this start's processes."""
        self._store.delete_key(f"dtrain/ended/{self.placement.job}/{run}")

    @classmethod
    def ended_before(cls, placement: Placement, run: str) -> Outcome | None:
        """The outcome that was remembered, if torchrun has started a run again that had stopped, or lets a spare node
        go on with it."""
        if placement.store is None:
            return None
        store = dist.TCPStore(*placement.store, is_master=False, timeout=timedelta(seconds=30))
        key = f"dtrain/ended/{placement.job}/{run}"
        if not store.check([key]):
            return None
        when, outcome = json.loads(store.get(key))
        # A store that isn't torchrun's own may have it of an earlier start of the job.
        age_s = time.time() - when
        of_this_start = placement.restarts > 0 or alive_s(os.getppid()) > age_s
        return Outcome.of(outcome) if age_s < _WORD_HOLDS_S and of_this_start else None
