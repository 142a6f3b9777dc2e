"""`Schedule`: what is due after a step: nothing, a snapshot in memory, or a checkpoint, here or there.

One rank decides and tells the others, since clocks differ. What `auto` stands for is worked out from what was measured:

    snapshots   as often as they take 1% of the time
    checkpoints at the distance that loses the least, of a save's cost and of lost work together: Daly's estimate
                (J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
                Generation Computer Systems 22, 2006, equation 37), with the mean time between failures as given
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from statistics import median
from typing import Literal

from dtrain.config import Interval

SHARE = 0.01
"""Of the time that automatic snapshots may take."""
_FEW = 2
_UNKNOWN_COST_S = 1.0
"""What a save is taken to cost before one was measured."""


class Action(IntEnum):
    NOTHING = 0
    SNAPSHOT = 1
    LOCAL_SAVE = 2
    SAVE = 3


class Schedule:
    """See above.

    :param epoch_after: the epoch that the data is in after so many steps; called only for an interval of epochs.
    :param mtbf_s: mean time between two failures, in seconds.
    :param early: what to do with a checkpoint that is due while the one before is still being written.
    :ivar skipped: how many checkpoints weren't made for that reason.
    """

    def __init__(
        self,
        save_every: Interval,
        snapshot_every: Interval,
        epoch_after: Callable[[int], int],
        *,
        mtbf_s: float,
        early: Literal["wait", "skip"] = "wait",
        local_save_every: Interval | None = None,
    ) -> None:
        self._save_every = save_every
        self._snapshot_every = snapshot_every
        self._epoch_after = epoch_after
        self._mtbf_s = mtbf_s
        self._early = early
        self._local_save_every = local_save_every
        self._saved_at = self._local_saved_at = self._snapped_at = time.monotonic()
        self._local_missed = self._local_under_way = False
        self._snapped_step = -1
        self._steps: deque[float] = deque(maxlen=20)
        self._stalls: deque[float] = deque(maxlen=5)
        self._cost_s = _UNKNOWN_COST_S
        self._extra_s: float | None = None
        self.skipped = 0

    def stepped(self, seconds: float, *, saving: bool) -> None:
        """A step was done.

        :param seconds: it took, without what came after it.
        :param saving: whether a checkpoint was being written beside it.
        """
        if saving and self._local_under_way:
            return  # what it costs is nothing to go by for an upload
        if saving:
            usual = median(self._steps) if self._steps else seconds
            self._extra_s = (self._extra_s or 0.0) + max(0.0, seconds - usual)
            return
        self._steps.append(seconds)
        if self._extra_s is not None:
            self._cost_s = self._extra_s + (median(self._stalls) if self._stalls else 0.0)
            self._extra_s = None

    def snapped(self, step: int, stall_s: float) -> None:
        """A snapshot was taken. :param stall_s: how long it held up the training, with all that went before it."""
        self._snapped_step, self._snapped_at = step, time.monotonic()
        self._stalls.append(stall_s)

    def saved(self, *, local: bool = False) -> None:
        """A checkpoint is on its way: the clock starts again."""
        self._local_saved_at = time.monotonic()  # whatever is saved elsewhere needn't be saved here as well
        self._local_missed, self._local_under_way = False, local
        if not local:
            self._saved_at = self._local_saved_at
            self._extra_s = 0.0

    def due(self, step: int, *, busy: bool) -> Action:
        """What to do after a step. :param busy: whether a checkpoint is still being written."""
        if self._passed(self._save_every, self._saved_at, step):
            if not busy or (self._early == "wait" and self._save_every.unit in ("steps", "epochs")):
                return Action.SAVE
            self.skipped += self._save_every.unit in ("steps", "epochs")
        if self._local_save_every is not None:
            # It never waits for an upload: it comes when that is done.
            due = self._passed(self._local_save_every, self._local_saved_at, step)
            self._local_missed = self._local_missed or due
            if self._local_missed and not busy:
                return Action.LOCAL_SAVE
        return Action.SNAPSHOT if self._snapshot_due(step) else Action.NOTHING

    @property
    def save_every_s(self) -> float:
        """The distance between two checkpoints that `auto` has come to, in seconds."""
        cost, mtbf = max(self._cost_s, 1e-3), self._mtbf_s
        if cost >= 2 * mtbf:
            return mtbf
        ratio = cost / (2 * mtbf)
        return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost

    @property
    def snapshot_every_steps(self) -> int:
        """The distance between two snapshots that `auto` has come to, in steps."""
        if not self._stalls or not self._steps:
            return 1
        # The first ones take long, as their memory is touched for the first time; later, the typical one counts.
        stall_s = median(self._stalls) if len(self._stalls) > _FEW else min(self._stalls)
        return max(1, math.ceil(stall_s / (SHARE * max(median(self._steps), 1e-9))))

    def _passed(self, every: Interval, since: float, step: int) -> bool:
        """Whether an interval has. :param since: when it began, for those that go by the clock."""
        if every.unit == "steps":
            return step % int(every.amount) == 0
        if every.unit == "epochs":
            length = int(every.amount)
            return self._epoch_after(step) // length > self._epoch_after(step - 1) // length
        seconds = every.amount if every.unit == "seconds" else self.save_every_s
        return time.monotonic() - since >= seconds

    def _snapshot_due(self, step: int) -> bool:
        every = self._snapshot_every
        if every.unit == "steps":
            return step % int(every.amount) == 0
        if every.unit == "seconds":
            return time.monotonic() - self._snapped_at >= every.amount
        return step - self._snapped_step >= self.snapshot_every_steps
