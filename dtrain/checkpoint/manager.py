"""`Manager`: a trainer's checkpoints: takes snapshots, has them saved, and restores.

Nothing is written here: that is the saver's work (see `saver`). Every method is a collective operation unless it says
otherwise: all ranks must reach it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from dtrain.checkpoint import memory
from dtrain.checkpoint.catalog import CHECKPOINTS, candidates
from dtrain.checkpoint.channel import Client
from dtrain.checkpoint.format import Manifest
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.reader import files_needed, load_shared, load_tensors
from dtrain.checkpoint.slots import Key, Slots, Snapshot
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State, position_of
from dtrain.checkpoint.tree import flatten
from dtrain.errors import Damaged, DtrainError, Fenced, NoGoodCheckpoint, SaveError
from dtrain.observe.events import Events
from dtrain.storage.base import Storage

T = TypeVar("T")

_PLACES = ("storage", "local")
_LOOK_S = 0.01


@dataclass(frozen=True)
class Restored:
    """A state that was loaded."""

    step: int
    position: dict[str, Any]
    """The run's own part of it."""
    committed: bool
    """Whether it's the newest checkpoint's."""
    newest: int
    """The step of that one; 0 if there is none."""


class Manager:
    """The checkpoints of one run folder, and of the local folder beside it, for one generation of ranks.

    :param storages: of the two, or of the run folder alone, in the order that the saver knows them in.
    :ivar epoch: the one that this group of savers claimed.
    :ivar stall_s: how long the last snapshot held up the training, in seconds.
    """

    def __init__(
        self, storages: Sequence[Storage], client: Client, slots: Slots, snapshots: Snapshots, events: Events
    ) -> None:
        self._storages = storages
        self._client = client
        self._slots = slots
        self._snapshots = snapshots
        self._events = events
        self.epoch = 0
        self.stall_s = 0.0
        self._local_problem: Exception | None = None

    def claim(self) -> None:
        """Take the run over from any earlier group of savers."""
        self.epoch = self._slots.board.stamp = from_rank_0(self._client.claim)

    def restore(self, state: State, usable: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> Restored | None:
        """Load the newest state that all ranks can have; None if there is none yet.

        That is the newest snapshot in memory, after the death of a trainer or a node; else the newest good checkpoint,
        the local one of two of the same step. A checkpoint that fails its check on any rank is recorded as bad on all
        of them, and the one before is taken.

        :param usable: asked on rank 0, with the run's own part of it, whether a snapshot in memory may be taken.
        :raises NoGoodCheckpoint: there are commits, and none of them is good.
        :raises StateError: the tracked objects aren't those that were saved.
        """
        logs = [Log(storage) for storage in self._storages]
        committed, epoch = from_rank_0(functools.partial(self._newest_commits, logs))
        return self._from_memory(state, committed, epoch, usable) or self._from_storage(state, logs, committed[0])

    def snapshot(self, state: State, step: int, position: dict[str, Any]) -> None:
        """Copy the state into memory. No collective operation."""
        self._take(state, step, position, lambda _: None)

    def save(
        self,
        state: State,
        step: int,
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
        *,
        local: bool = False,
    ) -> None:
        """Copy the state into memory, and have it saved while the training goes on. No collective operation.

        Waits for the save before it, if that is still under way.

        :param local: save to the local folder.
        :raises SaveError: that one has failed; the commit before it stands.
        :raises Fenced: a newer generation has taken the run over.
        """
        self.wait()
        self._take(state, step, position, lambda snapshot: self._client.begin(snapshot, metrics or {}, int(local)))

    def wait(self) -> None:
        """Wait until all that was to be saved is committed. No collective operation.

        :raises SaveError: it couldn't be; the commit before it stands.
        :raises Fenced: a newer generation has taken the run over.
        """
        self._snapshots.complete()
        self._client.wait()

    def settle(self) -> None:
        """Wait until this rank's saver is at nothing, whatever came of it. No collective operation."""
        while self._client.busy:
            time.sleep(_LOOK_S)

    def forget(self) -> None:
        """Let the next restore be from storage, of what is committed or asked for by now. No collective operation."""
        self._snapshots.complete()
        self._snapshots.drop()  # first, as this process may be ended while it waits, by a rank whose save has failed
        self._client.wait()

    def complete(self) -> None:
        """Wait until the tensors may change again, after a copy that goes on beside the training."""
        self._snapshots.complete()

    @property
    def committed(self) -> int:
        """The step of the last commit that this rank's saver knows of; 0 before."""
        return self._slots.board.committed

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._client.busy

    def _take(self, state: State, step: int, position: dict[str, Any], then: Callable[[Snapshot], None]) -> None:
        started = time.monotonic()
        self._snapshots.take(state.tree(position), step, self._steady(state), then)
        self.stall_s = time.monotonic() - started

    def _steady(self, state: State) -> Collection[str]:
        """Names of the tensors that nothing but the optimizer changes."""
        if not torch.cuda.is_initialized():
            return ()
        return {f"{name}.{key}" for name, module in state.modules().items() for key, _ in module.named_parameters()} | {
            f"{name}.state.{key}"
            for name, optimizer in state.objects.items()
            if isinstance(optimizer, Optimizer)
            for key in flatten(state.tree({})[name]["state"])
        }

    def _newest_commits(self, logs: list[Log]) -> tuple[list[int], int]:
        """The step of each place's, and the first epoch of the group that has committed to the run folder last."""
        logs[0].refresh()
        for log in logs[1:]:
            with suppress(OSError):  # the run can do without, and says so when it looks there for a checkpoint
                log.refresh()
        if logs[0].first_epoch(logs[0].epoch) != logs[0].first_epoch(self.epoch):  # who replaces a saver claims anew
            raise Fenced(
                f"{self._storages[0].root}: epoch {logs[0].epoch} took over; epoch {self.epoch} is a leftover and stops"
            )
        counts = _counts(logs[0])
        steps = [
            max((entry.step for entry in log.commits() if log is logs[0] or counts(entry)), default=0) for log in logs
        ]
        return steps, logs[0].first_epoch(_newest_epoch(logs[0]))

    def _from_memory(
        self, state: State, committed: list[int], epoch: int, usable: Callable[[Mapping[str, Any]], bool]
    ) -> Restored | None:
        """Load the newest snapshot, unless there is a checkpoint of a later step, or of a later group."""
        least = max(committed)
        passed_over: set[Key] = set()

        def counts(snapshot: Snapshot) -> bool:
            return snapshot.step >= least and snapshot.epoch >= epoch and snapshot.key not in passed_over

        while True:
            started = time.monotonic()
            found = memory.find(self._slots, counts)
            if found is None:
                return None
            manifests: list[Manifest] = []
            problem = on_all_ranks(functools.partial(_read_manifest, found, manifests), (Exception,))
            if problem:
                self._forget(found.step, problem)
            (manifest,) = manifests
            if from_rank_0(functools.partial(usable, position_of(manifest))):
                break
            passed_over.add(found.key)
        targets = state.targets(manifest)
        with memory.at_hand(found, files_needed(manifest, targets)) as storage:
            problem = on_all_ranks(lambda: load_tensors(storage, storage.root, manifest, targets), (Exception,))
        if problem:
            self._forget(found.step, problem)
        self._slots.keep(found.key)
        position = state.apply(manifest, targets)
        if dist.get_rank() == 0:
            seconds = time.monotonic() - started
            self._events.emit("restored", step=found.step, seconds=seconds, place="memory")
        if found.key[0] != self.epoch:  # another group's, perhaps of other ranks: from here on, this one has its own
            self.snapshot(state, found.step, position)
        return Restored(found.step, position, found.step == committed[0], committed[0])

    def _forget(self, step: int, problem: str) -> NoReturn:
        """A part of a snapshot may be in the objects already: only a new trainer can begin without it."""
        self._slots.keep(None)
        raise RuntimeError(f"the snapshot of step {step} in memory can't be read, and is forgotten: {problem}")

    def _from_storage(self, state: State, logs: list[Log], newest: int) -> Restored | None:
        found_by_rank_0 = self._candidates(logs)
        while True:
            found = from_rank_0(lambda: next(found_by_rank_0))
            if found is None:
                return None
            place, (commit, data) = found
            manifest = Manifest.from_json(data)
            started = time.monotonic()
            targets = state.targets(manifest)
            folder = f"{CHECKPOINTS}/{commit.attempt}"
            read = load_shared if torch.cuda.is_initialized() else load_tensors
            expected = (Damaged, OSError) if place else (Damaged,)  # the run can do without a local one
            problem = on_all_ranks(functools.partial(read, self._storages[place], folder, manifest, targets), expected)
            if problem:
                from_rank_0(functools.partial(self._client.condemn, commit.attempt, commit.step, problem, place))
                continue
            position = state.apply(manifest, targets)
            from_rank_0(functools.partial(self._acquit, logs[place], commit, place))
            if dist.get_rank() == 0:
                seconds = time.monotonic() - started
                self._events.emit("restored", step=commit.step, seconds=seconds, place=_PLACES[place])
            return Restored(commit.step, position, place == 0, commit.step if place == 0 else min(newest, commit.step))

    def _acquit(self, log: Log, commit: Entry, place: int) -> None:
        """On rank 0: have a checkpoint count again that was found bad before, now that it is restored whole."""
        if any(entry.attempt == commit.attempt for entry in log.bad()):
            self._client.acquit(commit.attempt, commit.step, place)

    def _candidates(self, logs: list[Log]) -> Iterator[tuple[int, tuple[Entry, bytes]] | None]:
        """The good commits of all places, newest first, each with its place; None if there is none."""
        near = self._local_candidates(logs)
        first = next(near, None)
        try:
            for far in candidates(self._storages[0], logs[0], self._client.condemn):
                while first is not None and (far is None or first[0].step >= far[0].step):
                    yield 1, first
                    first = next(near, None)
                if far is None and self._local_problem is not None:
                    raise self._local_problem
                yield None if far is None else (0, far)
        except NoGoodCheckpoint:
            while first is not None:
                yield 1, first
                first = next(near, None)
            raise

    def _local_candidates(self, logs: list[Log]) -> Iterator[tuple[Entry, bytes]]:
        for storage, log in zip(self._storages[1:], logs[1:], strict=True):
            condemn = functools.partial(self._client.condemn, place=1)
            try:
                for found in candidates(storage, log, condemn, _counts(logs[0])):
                    if found is not None:
                        yield found
            except (NoGoodCheckpoint, OSError) as error:  # there is the other place
                self._local_problem = error
                self._events.warn(str(error))


def _read_manifest(found: memory.Found, into: list[Manifest]) -> None:
    into.append(memory.manifest_of(found))


def _counts(run: Log) -> Callable[[Entry], bool]:
    """Whether a local commit counts: it doesn't any more when a later group of savers has committed to the run.

    :param run: the run folder's log.
    """
    newest = _newest_epoch(run)
    return lambda commit: commit.group >= newest


def _newest_epoch(run: Log) -> int:
    """The last one that has committed."""
    return max((entry.epoch for entry in run.entries if entry.kind == "commit"), default=0)


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


def from_all_ranks(mine: T) -> list[T]:
    """What each rank has."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def on_all_ranks(work: Callable[[], object], expected: tuple[type[Exception], ...]) -> str:
    """Do something on every rank. :returns: the first rank's failure of an expected kind; empty if there is none."""
    problem = ""
    try:
        work()
    except expected as error:
        problem = f"rank {dist.get_rank()}: {error}"
    return next(filter(None, from_all_ranks(problem)), "")
