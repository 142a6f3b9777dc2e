"""When to save, and what to keep."""

from __future__ import annotations

import time
from collections.abc import Callable

from dtrain.checkpoint.log import Entry, Log
from dtrain.config import Interval


class SavePolicy:
    """Says whether a checkpoint is due after a step.

    :param every: the distance between two checkpoints.
    :param epoch_after: the epoch that the data is in after so many steps; called only for an interval of epochs.
    """

    def __init__(self, every: Interval, epoch_after: Callable[[int], int]) -> None:
        self._every = every
        self._epoch_after = epoch_after
        self._last_saved = time.monotonic()

    def saved(self) -> None:
        """A checkpoint has been made: the clock starts again."""
        self._last_saved = time.monotonic()

    def due_by_clock(self) -> bool:
        """Clocks differ between ranks, so one of them asks its own and tells the others."""
        return self._every.unit == "seconds" and time.monotonic() - self._last_saved >= self._every.amount

    def due_after(self, step: int) -> bool:
        """The same on all ranks, since it follows from the step alone."""
        if self._every.unit == "steps":
            return step % int(self._every.amount) == 0
        if self._every.unit == "epochs":
            length = int(self._every.amount)
            return self._epoch_after(step) // length > self._epoch_after(step - 1) // length
        return False


def to_retire(log: Log, keep_last: int) -> list[Entry]:
    """The commits that are to be deleted: all but the newest `keep_last` good ones.

    One that was found bad is kept as long as the good ones of its age, for whoever wants to know what happened.
    """
    good = log.commits()
    kept = good[-keep_last:]
    if not kept:
        return []
    bad = {entry.attempt for entry in log.bad()}
    failed = [e for e in log.entries if e.kind == "commit" and e.attempt in bad and e.number < kept[0].number]
    return good[:-keep_last] + failed
