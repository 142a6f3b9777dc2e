"""`Page`: where a trainer is, in memory that it shares with its supervisor.

The trainer leaves a mark at everything that it comes to. It costs less than a microsecond, so it can be done often;
the supervisor looks once a second. A trainer that leaves none for too long hangs, or waits for one that does.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from enum import IntEnum

STOPPED = 2
_LEARNED_KEEPS = 0.9
"""How much of the longest silence is still remembered a step later."""


class Phase(IntEnum):
    """What a trainer is at, in the order of a step."""

    MAIN = 0
    """The user's own code before the first step, and what is behind the last."""
    RESTORE = 1
    BETWEEN = 2
    """The loop's body, behind a backward pass."""
    DATA = 3
    FORWARD = 4
    BACKWARD = 5
    UPDATE = 6
    BODY = 7
    """The rest of the loop's body."""
    VALIDATION = 8
    SAVE = 9
    END = 10

    @property
    def text(self) -> str:
        return {
            Phase.MAIN: "main, outside of the steps",
            Phase.RESTORE: "the restore",
            Phase.BETWEEN: "the loop's body after a backward pass",
            Phase.DATA: "loading data",
            Phase.FORWARD: "the forward pass",
            Phase.BACKWARD: "the backward pass",
            Phase.UPDATE: "the update",
            Phase.BODY: "the loop's body after the update",
            Phase.VALIDATION: "validation",
            Phase.SAVE: "taking a snapshot",
            Phase.END: "the end, after its loop",
        }[self]


class Page(ctypes.Structure):
    """A few numbers.

    generation: the one that this is
    restored: the step that this generation started from
    step: the last step that this generation has finished
    best: the last step that any generation before has finished
    committed: the step of the newest checkpoint, when a generation was last restored
    stop: 1 when the run is to save and end after the step that it is in; `STOPPED` when the trainer has done so
    at: the step that is under way; 0 outside of the steps
    micro_batch: the one of the step's list that is computed, from 0; -1 if none is
    left: how many micro-batches this rank still has to finish in the step
    phase: see `Phase`
    marked_ns: when the last mark was left, on the monotonic clock
    learned_ns: the longest time between two marks of the steps of late
    """

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("generation", "restored", "step", "best", "committed", "stop"),
            *("at", "micro_batch", "left", "phase", "marked_ns", "learned_ns"),
        )
    )

    generation: int
    restored: int
    step: int
    best: int
    committed: int
    stop: int
    at: int
    micro_batch: int
    left: int
    phase: int
    marked_ns: int
    learned_ns: int

    @classmethod
    def shared(cls) -> Page:
        """One that stays the same memory on both sides of a fork."""
        return cls.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))

    def begin(self, generation: int, best: int) -> None:
        self.generation, self.best, self.stop = generation, best, 0
        self.restored = self.step = self.at = self.left = self.learned_ns = 0
        self.micro_batch = -1
        self.mark(Phase.MAIN)

    def mark(self, phase: Phase) -> None:
        """Come to something."""
        now = time.monotonic_ns()
        if self.at:
            self.learned_ns = max(self.learned_ns, now - self.marked_ns)
        self.phase = phase
        self.marked_ns = now

    def finished(self, step: int) -> None:
        """Come to the end of a step."""
        self.mark(Phase.BODY)
        self.step = step
        self.learned_ns = int(self.learned_ns * _LEARNED_KEEPS)
