"""`Saves`: a run's checkpoints and snapshots: what is in them beside the tracked objects, and when they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dtrain.checkpoint.log import Log
from dtrain.checkpoint.manager import Manager, Restored, from_rank_0
from dtrain.checkpoint.policy import best_of
from dtrain.checkpoint.schedule import Action, Schedule
from dtrain.checkpoint.state import State
from dtrain.config import SAME_BITS, Config, Interval
from dtrain.errors import UsageError
from dtrain.training.ema import EMA
from dtrain.training.guards import Watch
from dtrain.training.selection import Selection, uncommitted
from dtrain.training.sources import Sources


class Saves:
    """One rank's, in one generation.

    :param skipped: steps that were passed over, which a checkpoint remembers.
    :param ready: called before each: what has to be done first.
    :param first: whether this is the first generation of a start of the job.
    :ivar done: the step that the state is that of.
    :ivar saved: the step of the newest checkpoint that was asked for; -1 before.
    :ivar committed: where the run stood on the disk when it was restored.
    :ivar watch: whose losses, which it looks back at, are kept as well.
    """

    def __init__(
        self,
        config: Config,
        manager: Manager,
        state: State,
        sources: Sources,
        skipped: set[int],
        ready: Callable[[], None],
        *,
        first: bool,
    ) -> None:
        self._config = config
        self._manager = manager
        self._state = state
        self._sources = sources
        self._skipped = skipped
        self._ready = ready
        self.selection = Selection(config.keep_best, config.early_stop)
        local = config.local_save_every
        self.schedule = Schedule(
            Interval.parse(config.save_every),
            Interval.parse(config.snapshot_every, "snapshot_every"),
            sources.epoch_after,
            mtbf_s=config.mtbf_hours * 3600,
            early=config.early_save,
            local_save_every=None if local is None else Interval.parse(local, "local_save_every"),
        )
        self.done = 0
        self.saved = -1
        self.committed = 0
        self.watch: Watch | None = None
        self._first = first
        self._told: set[str] = set()
        """The metrics that the newest checkpoint was asked for with."""

    def act(self, action: Action) -> None:
        """Do what is due."""
        match action:
            case Action.SAVE:
                self.save()
            case Action.LOCAL_SAVE:
                self._begin()
                self._manager.save(self._state, self.done, self._position(), local=True)
                self.schedule.saved(local=True)
                self.schedule.snapped(self.done, self._manager.stall_s)
            case Action.SNAPSHOT:
                started = time.monotonic()
                self._begin()
                self._manager.snapshot(self._state, self.done, self._position())
                self.schedule.snapped(self.done, time.monotonic() - started)

    def save(self, metrics: Mapping[str, float] | None = None) -> None:
        """Have the state committed, unless that was asked for before.

        :param metrics: what it was measured to be worth, since then.
        """
        known = {**(self.selection.measured if self.selection.measured_at == self.done else {}), **(metrics or {})}
        if self.saved == self.done and known.keys() <= self._told:
            return
        self._begin()
        self._manager.save(self._state, self.done, self._position(), known)
        self.saved, self._told = self.done, set(known)
        self.schedule.saved()
        self.schedule.snapped(self.done, self._manager.stall_s)

    def _begin(self) -> None:
        """:raises UsageError: the model isn't what it was trained to be just now."""
        for name, value in self._state.objects.items():
            if isinstance(value, EMA) and value.active:
                raise UsageError(
                    f"a checkpoint inside of {name}.applied() would hold the averaged weights in the place of the "
                    "trained ones: save after that block, or measure by run.evaluate(..., average=...)"
                )
        self._ready()

    def restore(self) -> Restored | None:
        """Load the newest state that all ranks can have; None if there is none. All ranks must reach it."""
        restored = self._manager.restore(self._state, self._usable)
        if restored is None:
            return None
        position = restored.position
        self._sources.restore(position["data"])
        self._skipped |= set(position.get("skipped", ()))
        self.done = restored.step
        self.saved = restored.step if restored.committed else -1
        self.committed = restored.newest
        if self.watch is not None:
            self.watch.load(position.get("losses", []))
        criterion = self._config.keep_best
        best = from_rank_0(lambda: self._best_in_log(restored.step)) if criterion else []
        known = {step for _, step in best}
        found = position.get("selection")
        if found is None:  # of a time when runs didn't know what was the best
            self.selection.best = best
            return restored
        # Each agent counts its own restarts, and not all of them are of one age.
        resume = self._config.resume_stopped and from_rank_0(lambda: self._first)
        self.selection.load(found, best, resume=resume)
        if found["ended"] and not self.selection.ended:  # or a failure in the next step would have it end again
            self.saved = -1
            self.save()
        if criterion and found["by"] == asdict(criterion) and restored.step in uncommitted(found, known):
            # It was found to be one of the best, and the run was killed before it was saved.
            if self.selection.rank(restored.step, self.selection.measured):
                self.save(self.selection.measured)
        elif self.saved == restored.step and self.selection.measured_at == restored.step:
            self._told = set(self.selection.measured)
        return restored

    def _usable(self, position: Mapping[str, Any]) -> bool:
        """On rank 0: whether a snapshot in memory may be gone on from.

        Not if one of the best models before it was lost on its way to the disk: the run then goes back to before that
        one was found.
        """
        selection, best = position.get("selection"), self._config.keep_best
        if not selection or best is None or selection["by"] != asdict(best):
            return True
        missing = [step for step in uncommitted(selection, self._measured_in_log()) if step < position["step"]]
        if missing:
            self._manager.settle()  # it may just be on its way
            missing = [step for step in missing if step not in self._measured_in_log()]
        return not missing

    def _measured_in_log(self) -> set[int]:
        """The steps that were ever committed with a metric to choose by."""
        log = self._read_log()
        best = self._config.keep_best
        return {e.step for e in log.entries if e.kind == "commit" and best is not None and best.metric in e.metrics}

    def _best_in_log(self, step: int) -> list[tuple[float, int]]:
        """The best models up to a step."""
        best = self._config.keep_best
        if best is None:
            return []
        found = best_of([entry for entry in self._read_log().commits() if entry.step <= step], best)
        return [(entry.metrics[best.metric], entry.step) for entry in found]

    def _read_log(self) -> Log:
        log = Log(self._config.storage())
        log.refresh()
        return log

    def _position(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "samples": self.done * self._config.global_batch,
            "config": {name: getattr(self._config, name) for name in SAME_BITS},
            "data": self._sources.positions(),
            "skipped": sorted(self._skipped),
            "selection": self.selection.state(),
            "losses": self.watch.state() if self.watch else [],
        }
