"""`Saver`: writes snapshots to storage and commits them, beside the training.

    trainer ── asks ──▶ saver      forked by the supervisor; outlives the trainer, is replaced when it dies
            ◀─ tells ──

One of them runs for every rank; they agree with each other through the store. Rank 0's alone writes the commit log. A
save is one file a rank: the slot as it lies in memory is written and hashed at once, by two threads.
"""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from dtrain.checkpoint.agreement import Agreement, Outcome, Report
from dtrain.checkpoint.catalog import CHECKPOINTS, Catalog
from dtrain.checkpoint.format import Part, digest, hash_item
from dtrain.checkpoint.holder import claimed, holder, released
from dtrain.checkpoint.policy import Keep
from dtrain.checkpoint.slots import Slots, Snapshot
from dtrain.checkpoint.writer import pickled, shard_name, with_values
from dtrain.config import Config, Interval
from dtrain.errors import DtrainError, Fenced, NoGoodCheckpoint, SaveError
from dtrain.observe.events import Events
from dtrain.storage.base import Sink, Storage

_PIECE_BYTES = 32 << 20
_LAST = 1 << 40
"""The number of a save that no trainer has asked for."""


class Saver:
    """One rank's.

    :param catalogs: of the places that are saved to: the run folder, and a local one if there is one. Where something
        is asked of a place, it is by its number among these. What is in them is used on rank 0 alone.
    :param slots: shared with the trainer.
    """

    def __init__(self, catalogs: Sequence[Catalog], agreement: Agreement, slots: Slots, events: Events) -> None:
        self._catalogs = catalogs
        self._agreement = agreement
        self._slots = slots
        self._board = slots.board
        self._events = events
        self._rank = agreement.rank
        self._mapped: dict[int, memoryview] = {}
        self._lock = threading.Lock()  # of the catalogs: a claim doesn't wait for a save that is under way

    @classmethod
    def of(cls, config: Config, connect: Callable[[], dist.Store], rank: int, world_size: int, slots: Slots) -> Saver:
        """The saver of a run's rank. :param connect: see `Agreement`."""
        events = Events(config.local_dir)
        younger_s = Interval.parse(config.keep_for).amount if config.keep_for else None
        keep = Keep(last=config.keep_last, every=config.keep_every, younger_s=younger_s, best=config.keep_best)
        catalogs = [Catalog(config.storage(), keep, events)]
        if local := config.local_storage():
            catalogs.append(Catalog(local, Keep(last=config.keep_last), events))
        return cls(catalogs, Agreement(connect, rank, world_size, config.timeout_s), slots, events)

    def claim(self) -> int:
        """On rank 0: take the run over, once for this group of savers. :returns: the epoch.

        :raises Fenced: a newer group has taken it over since.
        """
        run, *local = self._catalogs
        with self._lock:
            if run.epoch:
                run.log.check()
            else:
                if not self._board.epoch:
                    run.log.refresh()
                    if held := holder(self._events, run.log):
                        self._events.warn(held)
                # Who takes a dead saver's place goes on with its group's claim, if that is still the newest.
                run.claim(nonce=f"{self._board.group:016x}", after=self._board.epoch or None)
                self._board.epoch = run.epoch
                claimed(self._events, run.epoch)
            for catalog in local:
                catalog.group = run.epoch
                if not catalog.epoch:
                    try:
                        catalog.claim()
                    except (OSError, NoGoodCheckpoint) as error:  # the run does without, until the next save there
                        self._events.warn(f"{catalog.storage.root} can't be claimed: {_text(error)}")
            return run.epoch

    def release(self) -> None:
        """On rank 0, at its end: nothing more is written."""
        if self._rank == 0 and (epoch := self._catalogs[0].epoch):
            released(self._events, epoch)

    def condemn(self, attempt: str, step: int, reason: str, place: int = 0) -> None:
        """On rank 0: mark a checkpoint as bad."""
        self._note(place, step, lambda catalog: catalog.condemn(attempt, step, reason))

    def acquit(self, attempt: str, step: int, place: int = 0) -> None:
        """On rank 0: take back that a checkpoint is bad."""
        self._note(place, step, lambda catalog: catalog.acquit(attempt, step))

    def _note(self, place: int, step: int, note: Callable[[Catalog], None]) -> None:
        self.claim()
        catalog = self._catalogs[place]
        try:
            with self._lock:
                if catalog.epoch:
                    note(catalog)
        except OSError as error:
            if place == 0:
                raise
            self._events.warn(f"{catalog.storage.root}: what was found of step {step} can't be noted: {_text(error)}")

    def save(self, snapshot: Snapshot, number: int, metrics: dict[str, float], place: int = 0) -> Outcome:
        """Write one rank's part, and have all of it committed. All ranks' savers must come to it.

        :param number: which save of its generation it is, beginning at 1.
        """
        name = save_name(snapshot.generation, number)
        catalog = self._catalogs[place]
        started = time.monotonic()
        try:
            if self._rank == 0:
                outcome = self._lead(name, number, snapshot, catalog, metrics, started)
            else:
                outcome = self._follow(name, snapshot, catalog)
        finally:
            self._board.held = 0
        if not outcome.error and place == 0:
            self._board.committed = snapshot.step
        return _of_place(outcome, place)

    def tidy(self) -> None:
        """On rank 0, after a save that nobody waits for any more: delete the checkpoints that it took the place of."""
        for catalog in self._catalogs:
            if self._rank != 0 or not catalog.epoch:
                continue
            try:
                with self._lock:
                    retired = catalog.retire()
                for attempt in retired:  # without the lock: a new trainer's claim doesn't wait for it
                    catalog.discard(attempt)
            except Exception as error:
                # What was saved is safe. If this is no passing trouble, the next save meets it as well, and says so.
                self._events.warn(f"old checkpoints in {catalog.storage.root} can't be deleted: {_text(error)}")

    def last(self, timeout_s: float) -> None:
        """Save the newest snapshot that all ranks have, where there is no later checkpoint: no trainer will any more.

        :param timeout_s: how long to wait for the other ranks to be at the same point, in seconds.
        """
        us = self._rank, self._agreement.world_size
        have = {found.key: found for found in self._slots.whole() if (found.rank, found.world_size) == us}
        try:
            newest = self._agreement.common(have.keys(), timeout_s)
            if newest is not None and have[newest].step > self._board.committed:
                self.save(have[newest], _LAST, {})
                self.tidy()
        except Exception as error:  # the store is gone, say
            self._events.warn(f"the newest state in memory could not be saved at the end: {_text(error)}")

    def interrupted(self, generation: int, number: int) -> Outcome:
        """In the place of a saver that died in a save: call that off. :returns: what came of it, on all ranks."""
        name = save_name(generation, number)
        outcome = Outcome(f"the saver of rank {self._rank} died while it saved")
        if self._rank == 0 and (attempt := self._agreement.attempted(name)):
            try:
                self.claim()
                with self._lock:
                    if any(entry.attempt == attempt for c in self._catalogs for entry in c.log.commits()):
                        outcome = Outcome()  # it died after the commit
            except Exception as error:  # the others wait for a word
                outcome = Outcome(f"{outcome.error}, and what came of it can't be read: {_text(error)}")
        self._agreement.call_off(name, outcome)
        outcome = self._agreement.outcome(name)
        place = self._board.place
        if not outcome.error and self._board.held and place == 0:
            self._board.committed = self._board.slots[self._board.held - 1].step
        self._board.held = 0
        return _of_place(outcome, place)

    def call_off(self, generation: int, number: int, why: str) -> None:
        """Let the other ranks' savers not wait for this one's part of a save."""
        self._agreement.call_off(save_name(generation, number), Outcome(why))

    def _lead(
        self, name: str, number: int, snapshot: Snapshot, catalog: Catalog, metrics: dict[str, float], started: float
    ) -> Outcome:
        """Rank 0's part: its own file, and the commit."""
        attempt = ""
        try:
            if not catalog.epoch:
                self.claim()
            if not catalog.epoch:
                raise SaveError("it can't be claimed")
            with self._lock:
                late = number == _LAST and _is_late(snapshot, catalog)
                attempt = self._agreement.attempt(name, "" if late else catalog.new_attempt(snapshot.step))
            if not attempt:
                return self._agreement.conclude(name, Outcome("it was called off"))
            meta = snapshot.meta()
            try:
                self._agreement.report(name, *self._write(snapshot, meta, catalog.storage, attempt))
            except Exception as error:
                raise SaveError(f"rank 0: {_text(error)}") from error
            reports = self._agreement.reports(name)
            self._check(reports)
            parts = [
                Part(file=shard_name(rank), size=report.size, items=items, digests=report.digests)
                for rank, (report, (items, _)) in enumerate(zip(reports, self._agreement.layouts(reports), strict=True))
                if report.size
            ]
            manifest = catalog.indexes.write(
                catalog.storage,
                f"{CHECKPOINTS}/{attempt}",
                parts,
                step=snapshot.step,
                world_size=len(reports),
                tree=meta["tree"],
                tensors=[tensors for _, tensors in self._agreement.layouts(reports)],
                key=tuple(report.layout for report in reports),
            )
            self._agreement.decide(name)
        except Exception as error:
            if attempt:
                catalog.discard(attempt)  # a full disk is not made fuller
            else:
                self._agreement.attempt(name, "")  # the others wait for it
            return self._fail(name, error, f"step {snapshot.step} could not be saved in {catalog.storage.root}")
        size = sum(part.size for part in parts) + catalog.indexes.bytes
        try:
            with self._lock:
                catalog.commit(
                    attempt,
                    step=snapshot.step,
                    manifest=manifest,
                    bytes=size,
                    world_size=len(reports),
                    metrics=metrics,
                )
        except Exception as error:
            # The attempt stays where it is: the entry may have got into the log all the same.
            return self._fail(name, error, f"step {snapshot.step} could not be committed in {catalog.storage.root}")
        seconds, place = time.monotonic() - started, "storage" if catalog is self._catalogs[0] else "local"
        self._events.emit("committed", step=snapshot.step, seconds=seconds, bytes=size, place=place)
        return self._agreement.conclude(name, Outcome())

    def _fail(self, name: str, error: Exception, what: str) -> Outcome:
        """Tell all ranks that a save has failed, and whoever looks on."""
        if isinstance(error, DtrainError):
            outcome = Outcome(str(error), type(error).__name__)
        else:
            outcome = Outcome(f"{what}: {_text(error)}")
        self._events.warn(outcome.error)
        return self._agreement.conclude(name, outcome)

    def _follow(self, name: str, snapshot: Snapshot, catalog: Catalog) -> Outcome:
        """Any other rank's part: its own file."""
        try:
            attempt = self._agreement.attempt(name)
            if attempt:
                self._agreement.report(name, *self._write(snapshot, snapshot.meta(), catalog.storage, attempt))
        except Exception as error:
            self._agreement.report(name, Report(error=_text(error)))
        return self._agreement.outcome(name)

    def _write(
        self, snapshot: Snapshot, meta: dict[str, Any], storage: Storage, attempt: str
    ) -> tuple[Report, str, str]:
        """Write this rank's shard file. :returns: what there is to report of it."""
        file = shard_name(self._rank)
        part = Part(file=file, size=snapshot.size, items=meta["items"], digests=b"")
        copies = pickled(meta["tree"]) if self._rank == 0 else {}
        if snapshot.size or copies:
            memory = self._memory_of(snapshot)
            with (
                storage.open_new(f"{CHECKPOINTS}/{attempt}/{file}", snapshot.size) as sink,
                ThreadPoolExecutor(1) as hashing,
            ):
                digests = hashing.submit(_hash_items, memory, meta["items"])
                _write_all(sink, memory)
                part = Part(file=file, size=snapshot.size, items=meta["items"], digests=digests.result())
                if copies:
                    part = with_values(part, copies, sink)
        layout = digest((part.items + meta["tensors"]).encode()) if copies else meta["layout"]
        report = Report(
            layout=layout, size=part.size, shapes=meta["shapes"], objects=meta["objects"], digests=part.digests
        )
        return report, part.items, meta["tensors"]

    def _memory_of(self, snapshot: Snapshot) -> memoryview:
        """A snapshot's shard file, as it lies in memory."""
        if snapshot.size == 0:
            return memoryview(b"")
        kept = self._mapped.get(snapshot.slot)
        if kept is not None and kept.nbytes == snapshot.size and snapshot.path == self._slots.in_memory(snapshot.slot):
            return kept
        with open(snapshot.path, "rb") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = memoryview(mmap.mmap(file.fileno(), snapshot.size, flags=flags, prot=mmap.PROT_READ))
        # To map it anew for every save would take a third as long as to write it. What lies on the disk goes away
        # with its trainer, and must not be held.
        self._mapped.pop(snapshot.slot, None)
        if snapshot.path == self._slots.in_memory(snapshot.slot):
            self._mapped[snapshot.slot] = memory
        return memory

    def _check(self, reports: list[Report]) -> None:
        """:raises SaveError: a rank failed, or the ranks don't have the same state."""
        for rank, report in enumerate(reports):
            if report.error:
                raise SaveError(f"rank {rank}: {report.error}")
        for rank, report in enumerate(reports):
            if report.shapes != reports[0].shapes:
                raise SaveError(
                    f"the names, types or shapes of the tensors differ between ranks 0 and {rank}, and a checkpoint "
                    "has room for one model: build the same one on all ranks"
                )
            names = sorted(reports[0].objects.keys() | report.objects.keys())
            differ = [name for name in names if reports[0].objects.get(name) != report.objects.get(name)]
            if differ:
                raise SaveError(
                    f"the plain values of {', '.join(differ)} differ between ranks 0 and {rank}, and a checkpoint has "
                    "room for one: track what is the same on all ranks, or what has a key for each rank"
                )


def _of_place(outcome: Outcome, place: int) -> Outcome:
    """What a trainer is told. Where a local folder can't be written, it has been said, and the run does without."""
    return Outcome() if place and outcome.kind != Fenced.__name__ else outcome


def _is_late(snapshot: Snapshot, catalog: Catalog) -> bool:
    """Whether there is a commit of its step or a later one, or of a group behind the one that took it."""
    log = catalog.log
    return any(entry.step >= snapshot.step or log.first_epoch(entry.epoch) > snapshot.epoch for entry in log.commits())


def save_name(generation: int, number: int) -> str:
    """Of a save, among those of its group."""
    return f"save/{generation}/{number}"


def _hash_items(memory: memoryview, items: str) -> bytes:
    """The digests of the items in a shard file."""
    return b"".join(hash_item(memory[item[1] : item[1] + item[2]]) for item in json.loads(items))


def _write_all(sink: Sink, memory: memoryview) -> None:
    for start in range(0, memory.nbytes, _PIECE_BYTES):
        sink.write(memory[start : start + _PIECE_BYTES])


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, SaveError | OSError) else f"{type(error).__name__}: {error}"
