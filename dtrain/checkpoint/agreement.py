"""How the ranks' savers agree on one save: through the store, with a deadline, and without the trainers.

    rank 0      attempt    the folder that all write into; empty if it won't be tried
    every rank  report     what it has written, or why it couldn't
    any rank    decided    that it will be committed (rank 0), or that a rank has given it up
    rank 0      outcome    committed, or why not

Each is a key that is written once and waited for on the store's server. A save whose asker died on some rank before it
could ask is called off there by an empty report; so nobody waits for what can't come.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from dtrain.checkpoint.machine import alive, machine
from dtrain.checkpoint.slots import Key

_LOOK_AGAIN_S = 0.1
"""For the others, at the end of a run."""


@dataclass(frozen=True)
class Outcome:
    """Of one save. Without an error, it is committed."""

    error: str = ""
    kind: str = "SaveError"
    """Name of the error's class."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank has written."""

    error: str = ""
    layout: str = ""
    """Digest of the layout, whose texts are sent once."""
    size: int = 0
    shapes: str = ""
    """Digest of all tensors' names, types and whole shapes."""
    objects: dict[str, str] = field(default_factory=dict)
    """Digest of each tracked object's plain values."""
    digests: bytes = b""

    def to_bytes(self) -> bytes:
        fields = asdict(self) | {"digests": None}
        return json.dumps(fields).encode() + b"\n" + self.digests

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        head, _, digests = data.partition(b"\n")
        return cls(**(json.loads(head) | {"digests": digests}))


class Agreement:
    """One rank's side of it.

    :param connect: makes a connection to the store below a prefix that is this group's; a second one is used to call
        off what the first one waits for.
    :param timeout_s: how long to wait for another rank's saver, in seconds.
    """

    def __init__(self, connect: Callable[[], dist.Store], rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._store = connect()
        self._aside = connect()
        self._store.set(f"process/{rank}", json.dumps([machine(), os.getpid()]))
        self._sent = ""
        self._layouts: dict[int, tuple[str, str, str]] = {}
        self._done: list[list[str]] = []

    def attempt(self, save: str, folder: str | None = None) -> str:
        """The folder that all ranks write into; empty if the save was called off.

        :param folder: on rank 0, the one that is to be; empty calls the save off.
        """
        if self.rank == 0:
            assert folder is not None
            return self._store.compare_set(f"{save}/attempt", "", folder or "-").decode().strip("-")
        self._store.wait([f"{save}/attempt"], self._timeout)
        return self._store.get(f"{save}/attempt").decode().strip("-")

    def report(self, save: str, report: Report, items: str = "", tensors: str = "") -> None:
        """Say what this rank has written.

        :param items: JSON text of the layout's items, and
        :param tensors: of the tensors' types and shapes.
        """
        if report.layout != self._sent and not report.error:
            # The store takes 8 MiB at most: packed, that is enough for hundreds of thousands of tensors a rank.
            packed = zlib.compress("\n".join((report.layout, items, tensors)).encode(), 1)
            self._store.set(f"layout/{self.rank}", cast(str, packed))
            self._sent = report.layout
        self._store.set(f"{save}/report/{self.rank}", cast(str, report.to_bytes()))  # takes both

    def reports(self, save: str) -> list[Report]:
        """On rank 0: what all ranks have written, in their order.

        :raises TimeoutError: some rank doesn't answer.
        """
        keys = [f"{save}/report/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, self._timeout)
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise TimeoutError(f"the savers of ranks {missing} did not answer within {self._timeout}") from None
        found = [Report.from_bytes(data) for data in self._get(keys)]
        # Whoever has reported this save has heard the outcome of the one before; but if it was called off on a rank
        # whose saver is still with the one before, only that of the one before that.
        while len(self._done) > 1:
            for key in self._done.pop(0):
                self._store.delete_key(key)
        self._done.append([*keys, *(f"{save}/{what}" for what in ("attempt", "decided", "outcome"))])
        return found

    def layouts(self, reports: list[Report]) -> list[tuple[str, str]]:
        """On rank 0: the texts of every rank's items and tensors."""
        new = [r for r, report in enumerate(reports) if self._layouts.get(r, ("",))[0] != report.layout]
        for rank, data in zip(new, self._get([f"layout/{rank}" for rank in new]), strict=True):
            key, items, tensors = zlib.decompress(data).decode().split("\n")
            self._layouts[rank] = key, items, tensors
        return [self._layouts[rank][1:] for rank in range(self.world_size)]

    def decide(self, save: str) -> None:
        """On rank 0, before the commit: from here on no rank gives the save up.

        :raises TimeoutError: one of them already has.
        """
        decided = self._store.compare_set(f"{save}/decided", "", "commit").decode()
        if decided != "commit":
            raise TimeoutError(decided)

    def conclude(self, save: str, outcome: Outcome) -> Outcome:
        """On rank 0: tell all ranks. :returns: what they were told, if that was before."""
        text = json.dumps(asdict(outcome))
        return Outcome(**json.loads(self._store.compare_set(f"{save}/outcome", "", text)))

    def outcome(self, save: str) -> Outcome:
        """On the others: wait for it. Who waits for too long gives the save up, unless it is being committed."""
        try:
            self._store.wait([f"{save}/outcome"], self._timeout)
        except dist.DistStoreError:
            why = f"rank 0's saver did not answer within {self._timeout}"
            if self._store.compare_set(f"{save}/decided", "", f"rank {self.rank} gave up: {why}") != b"commit":
                return Outcome(why)
            try:
                self._store.wait([f"{save}/outcome"], self._timeout)
            except dist.DistStoreError:
                return Outcome(f"{why}, and may have committed it")
        return Outcome(**json.loads(self._store.get(f"{save}/outcome")))

    def common(self, mine: Collection[Key], timeout_s: float) -> Key | None:
        """The newest of the snapshots that every rank has; None if there is none, or if not all ranks ask in time.

        :param mine: the keys of those that this rank has.
        """
        self._store.set(f"last/{self.rank}", json.dumps(list(mine)))
        keys = [f"last/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + timeout_s
        while missing := [rank for rank, key in enumerate(keys) if not self._store.check([key])]:
            if time.monotonic() > deadline or any(map(self._is_gone, missing)):
                self._store.set(f"last/{self.rank}", "[]")  # whoever comes later doesn't wait for this one
                return None
            time.sleep(_LOOK_AGAIN_S)  # a wait in the store that times out prints warnings of its own, piece by piece
        have: list[set[Key]] = [set(map(tuple, json.loads(data))) for data in self._get(keys)]
        return max(set.intersection(*have), default=None)

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process is known to have died, on this machine: whoever waits for it waits in vain."""
        if not self._store.check([f"process/{rank}"]):
            return False
        where, pid = json.loads(self._store.get(f"process/{rank}"))
        return where == machine() and not alive(pid)

    def attempted(self, save: str) -> str:
        """The folder that was given to a save; empty if there is none."""
        key = f"{save}/attempt"
        return self._aside.get(key).decode().strip("-") if self._aside.check([key]) else ""

    def call_off(self, save: str, outcome: Outcome) -> None:
        """End a save that this rank can't take part in any more, if it is under way on the others."""
        if self.rank == 0:
            self._aside.compare_set(f"{save}/attempt", "", "-")
            self._aside.compare_set(f"{save}/outcome", "", json.dumps(asdict(outcome)))
        else:
            self._aside.compare_set(f"{save}/report/{self.rank}", "", Report(error=outcome.error).to_bytes().decode())

    def _get(self, keys: list[str]) -> list[bytes]:
        return list(self._store.multi_get(keys)) if keys else []
