"""A group of supervisors, and the generations of trainers that it lives through.

torchrun's agents keep one store for the whole job, and restarts, resized groups and leftovers all write into it. So
every group agrees on a prefix of its own, and every generation gets one below it: nobody ever reads the address of a
process that is dead.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from dtrain.errors import ConfigError

_INBOX = "dtrain/inbox"
_GAP_S = 1.0
"""Who took a number in the inbox and died before writing to it is passed over after so long."""
_FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Placement:
    """Where this process stands in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: tuple[str, int] | None = None
    """Address of the store that torchrun's agents share; None for a process that is alone."""
    restarts: int = 0
    """How often torchrun has started this group of processes again."""
    local_world_size: int = 1
    """How many ranks there are on this machine."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Placement:
        """:raises ConfigError: several processes were started, but not by torchrun."""
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            if int(env.get("WORLD_SIZE", "1")) == 1:
                return cls()
            raise ConfigError(
                "several processes were started without torchrun's store; start them with torchrun, and without "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
            )
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            store=(env["MASTER_ADDR"], int(env["MASTER_PORT"])),
            restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a generation ended. The first supervisor to say so decides for all."""

    kind: Literal["done", "failed", "stopped"]
    """`failed` is followed by another generation, `stopped` isn't."""
    rank: int = -1
    """The rank that failed first."""
    cause: str = ""
    """One line."""
    trace: str = ""
    """The traceback, where there is one."""
    best: int = 0
    """The last step that any generation has finished."""
    stalled: int = 0
    """Generations in a row that ended without a new step."""


class Group:
    """The supervisors of a job, seen by one of them.

    :param timeout_s: how long to wait for the others to arrive, in seconds.
    """

    def __init__(self, placement: Placement, timeout_s: float) -> None:
        self.placement = placement
        self._timeout = timedelta(seconds=timeout_s)
        self._store = self._connect()
        self._prefix = f"dtrain/{self._form()}"
        self._board = dist.PrefixStore(self._prefix, self._store)

    def _connect(self) -> dist.Store:
        # A client has no thread of its own, so a supervisor may hold one and still fork.
        address = self.placement.store
        return dist.TCPStore(*address, is_master=False, timeout=self._timeout) if address else dist.HashStore()

    def _form(self) -> str:
        """Agree with the other supervisors on a name that no group had before.

        Everybody writes a nonce of its own into an inbox that rank 0 reads in order; rank 0 answers under that nonce,
        so that nothing that an earlier group left in the store can be taken for the answer.
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
            return name
        missing = set(range(1, place.world_size))
        deadline = time.monotonic() + self._timeout.total_seconds()
        number = 0
        while missing:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(missing)} did not start within {self._timeout}")
            message = self._read(number + 1)
            if message is None:
                continue
            number += 1
            if "nonce" in message:
                self._store.set(f"dtrain/invite/{message['nonce']}", me)
            elif message.get("joined") == me:
                missing.discard(int(message["rank"]))
        return me

    def _post(self, message: dict[str, object]) -> None:
        number = self._store.add(f"{_INBOX}/count", 1)
        self._store.set(f"{_INBOX}/{number}", json.dumps(message))

    def _read(self, number: int) -> dict[str, str] | None:
        """A message of the inbox; {} if its writer died; None if there is none yet."""
        key = f"{_INBOX}/{number}"
        try:
            self._store.wait([key], timedelta(seconds=_GAP_S))
        except dist.DistStoreError:
            return {} if self._store.add(f"{_INBOX}/count", 0) > number else None
        message: dict[str, str] = json.loads(self._store.get(key))
        return message

    def settle(self, generation: int, outcome: Outcome) -> Outcome:
        """Say how a generation ended, and learn who was first to say so."""
        text = json.dumps(asdict(outcome))
        decided = self._board.compare_set(f"{generation}/outcome", "", text)
        return Outcome(**json.loads(decided))

    def finished(self, generation: int) -> bool:
        """Say that this rank's trainer has come to its end; True if it was the last one."""
        return self._board.add(f"{generation}/finished", 1) == self.placement.world_size

    def outcome(self, generation: int) -> Outcome:
        """Of a generation that has been settled."""
        return Outcome(**json.loads(self._board.get(f"{generation}/outcome")))

    def watch(self, generation: int) -> int:
        """Block until a generation is settled. For a process of its own: it takes a connection of its own.

        :returns: 0, or 1 if the store is gone.
        """
        try:
            dist.PrefixStore(self._prefix, self._connect()).wait([f"{generation}/outcome"], _FOREVER)
        except dist.DistError:
            return 1
        return 0

    def trainers_store(self, generation: int) -> dist.Store:
        """A connection for a trainer, below the prefix of its generation."""
        return dist.PrefixStore(f"{self._prefix}/{generation}/trainers", self._connect())

    def savers_store(self) -> dist.Store:
        """A connection for a saver: savers outlive generations."""
        return dist.PrefixStore(f"{self._prefix}/savers", self._connect())

    def remember_stop(self, run: str, outcome: Outcome) -> None:
        """Leave word for the processes that torchrun will start in this one's place."""
        self._store.set(f"dtrain/stopped/{run}", json.dumps(asdict(outcome)))

    @classmethod
    def stopped_before(cls, placement: Placement, run: str) -> Outcome | None:
        """The outcome that was remembered, if torchrun has started a run again that had stopped."""
        if placement.restarts == 0 or placement.store is None:
            return None
        store = dist.TCPStore(*placement.store, is_master=False, timeout=timedelta(seconds=30))
        key = f"dtrain/stopped/{run}"
        return Outcome(**json.loads(store.get(key))) if store.check([key]) else None
