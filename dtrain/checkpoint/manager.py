"""`Manager`: a run's checkpoints: claims the run, saves, commits, restores, deletes.

Rank 0 alone reads and writes the log; what it finds it tells the others. Every method but the constructor is a
collective operation: all ranks must reach it.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dtrain.checkpoint.format import MANIFEST, Manifest
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.policy import to_retire
from dtrain.checkpoint.reader import Reader, read_manifest
from dtrain.checkpoint.state import State
from dtrain.checkpoint.writer import Writer
from dtrain.errors import Damaged, DtrainError, NoGoodCheckpoint, SaveError
from dtrain.observe.events import Events
from dtrain.storage.local import LocalStorage

CHECKPOINTS = "checkpoints"
T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was loaded."""

    step: int
    position: dict[str, Any]
    """The run's own part of the state."""


class Manager:
    """The checkpoints of one run folder, for one generation of ranks.

    :param keep_last: how many checkpoints to keep.
    """

    def __init__(self, storage: LocalStorage, keep_last: int, events: Events) -> None:
        self._storage = storage
        self._keep_last = keep_last
        self._events = events
        self._log = Log(storage)
        self._claim = Entry(kind="claim", epoch=0, time=0.0)

    @property
    def epoch(self) -> int:
        """The epoch that this generation claimed."""
        return self._claim.epoch

    def claim(self) -> None:
        """Take the run over from any earlier generation, and clear away what it left unfinished."""

        def on_rank_0() -> Entry:
            claim = self._log.claim(time.time(), uuid.uuid4().hex[:8])
            for broken in self._log.broken:
                self._events.warn(f"{self._storage.root}/{broken}: passed over")
            for folder in (".", FOLDER):
                self._storage.sweep(folder)
            whole = {e.attempt for e in self._log.commits()} | {e.attempt for e in self._log.bad()}
            for name in self._storage.names(CHECKPOINTS):
                # Only attempts of earlier epochs: they can't be committed any more. A newer one isn't ours to judge.
                # And none at all while an entry can't be read, since that may be the commit of any of them.
                if name not in whole and 0 <= _epoch_of(name) < claim.epoch and not self._log.broken:
                    self._storage.remove(f"{CHECKPOINTS}/{name}")
            return claim

        self._claim = from_rank_0(on_rank_0)

    def restore(self, state: State) -> Restored | None:
        """Load the newest good checkpoint; None if the run has none yet.

        One that fails its check on any rank is recorded as bad on all of them, and the one before is taken.

        :raises NoGoodCheckpoint: there are commits, and none of them is good.
        :raises StateError: the tracked objects aren't those that were saved.
        """
        candidates = self._candidates() if dist.get_rank() == 0 else iter(())
        while True:
            found = from_rank_0(lambda: next(candidates))
            if found is None:
                return None
            commit, data = found
            manifest = Manifest.from_json(data)
            started = time.monotonic()
            targets = state.targets(manifest)
            folder = f"{CHECKPOINTS}/{commit.attempt}"
            try:
                dcp.load(
                    dict(targets),
                    storage_reader=Reader(self._storage, folder, manifest),
                    planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                )
            except CheckpointException as error:
                reason = _explain(error, only=Damaged)
                from_rank_0(functools.partial(self._condemn, commit, reason))
                continue
            position = state.apply(manifest, targets)
            if dist.get_rank() == 0:
                self._events.emit("restored", step=commit.step, seconds=time.monotonic() - started)
            return Restored(commit.step, position)

    def save(self, state: State, step: int, position: dict[str, Any]) -> None:
        """Write and commit a checkpoint. When this returns, it is there after any crash.

        :raises SaveError: a rank could not write its part; the commit before stands.
        :raises Fenced: a newer generation has taken the run over.
        """
        started = time.monotonic()
        attempt = f"step-{step:08d}.e{self.epoch}.{self._claim.nonce}"
        writer = Writer(self._storage, f"{CHECKPOINTS}/{attempt}", state.tree(position), step=step)
        try:
            dcp.save(
                writer.state_dict,
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )
        except CheckpointException as error:
            if dist.get_rank() == 0:
                self._storage.remove(f"{CHECKPOINTS}/{attempt}")  # a full disk is not made fuller
            from_rank_0(self._log.check)  # a newer generation clears away what it finds half-written
            raise SaveError(f"step {step} could not be saved in {self._storage.root}: {_explain(error)}") from error
        from_rank_0(functools.partial(self._commit, writer, step, attempt, started))

    def _commit(self, writer: Writer, step: int, attempt: str, started: float) -> None:
        try:
            self._append("commit", step=step, attempt=attempt, manifest=writer.manifest)
        except OSError as error:
            # The attempt stays where it is: the entry may have got into the log all the same.
            raise SaveError(f"step {step} could not be committed in {self._storage.root}: {error}") from error
        seconds = time.monotonic() - started
        self._events.emit("committed", step=step, seconds=seconds, bytes=writer.size)
        for entry in to_retire(self._log, self._keep_last):
            self._append("retire", step=entry.step, attempt=entry.attempt)
            self._storage.remove(f"{CHECKPOINTS}/{entry.attempt}")

    def _candidates(self) -> Iterator[tuple[Entry, bytes] | None]:
        """The commits whose manifest and sizes are right, newest first, with the manifest; None if there is none."""
        self._log.refresh()
        commits = self._log.commits()
        for commit in reversed(commits):
            try:
                data, _ = read_manifest(self._storage, f"{CHECKPOINTS}/{commit.attempt}", MANIFEST, commit.manifest)
                yield commit, data
            except Damaged as error:
                self._condemn(commit, str(error))
        ever = [entry for entry in self._log.entries if entry.kind in ("commit", "bad")]
        if ever or self._log.broken:
            reasons = [f"step {e.step}: {e.reason}" for e in self._log.entries if e.kind == "bad"]
            raise NoGoodCheckpoint(
                f"{self._storage.root} has commits, but none of them can be read:\n  "
                + "\n  ".join(reasons + self._log.broken)
                + "\nBring the files back, or start in another run folder."
            )
        yield None

    def _condemn(self, commit: Entry, reason: str) -> None:
        self._append("bad", step=commit.step, attempt=commit.attempt, reason=reason)
        self._events.warn(f"checkpoint of step {commit.step} is damaged and passed over: {reason}")

    def _append(self, kind: Any, **fields: Any) -> None:
        self._log.append(Entry(kind=kind, epoch=self.epoch, time=time.time(), nonce=uuid.uuid4().hex[:8], **fields))


def from_rank_0(work: Callable[[], T]) -> T:
    """Do something on rank 0, and have its outcome, or its error, on all ranks."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (DtrainError, SaveError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _epoch_of(attempt: str) -> int:
    parts = attempt.split(".")
    return int(parts[1][1:]) if len(parts) == 3 and parts[1][1:].isdigit() else -1


def _explain(error: CheckpointException, only: type[BaseException] = BaseException) -> str:
    """The first rank's failure in words. With `only`, any failure of another kind is raised again instead."""
    failures = sorted(error.failures.items())
    for _, (cause, _) in failures:
        if not isinstance(cause, only):
            raise error
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failures[:1])
