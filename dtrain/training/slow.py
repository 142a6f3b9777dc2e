"""`Stragglers`: finds ranks that are slower than the others, step after step.

What counts is a rank's own time: from the moment that its last backward pass was over, when all ranks are level, to the
moment that the next one begins, at whose end they are level again. The times travel with the numbers that the ranks
add up anyway. Under FSDP the ranks wait for each other in every block, and only what lies between steps can be told
apart: data, the update, and the loop's own body.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

STEPS = 20
"""Looked at together: one slow step is nothing."""
_TIMES_SLOWER = 1.5
_PART_OF_STEP = 0.2
"""What a rank is behind by must be this much of a step at least,"""
_LEAST_S = 0.01
"""and as many seconds."""


class Stragglers:
    """Rank 0's.

    :param shares: how many micro-batches each rank has. Only ranks with as many are compared.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares
        self._times: deque[Sequence[float]] = deque(maxlen=STEPS)
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._named: set[int] = set()

    def stepped(self, own_s: Sequence[float], step_s: float) -> dict[int, tuple[float, float]]:
        """:param own_s: of each rank, in one step. :param step_s: how long that step took.
        :returns: the ranks that are slow and weren't before: their own time, and that of the rank in the middle.
        """
        self._times.append(own_s)
        self._steps.append(step_s)
        if len(self._times) < STEPS:
            return {}
        typical = [median(times) for times in zip(*self._times, strict=True)]
        behind = max(_LEAST_S, _PART_OF_STEP * median(self._steps))
        slow = {}
        for share in set(self._shares):
            alike = [rank for rank, theirs in enumerate(self._shares) if theirs == share]
            middle = sorted(typical[rank] for rank in alike)[(len(alike) - 1) // 2]
            for rank in alike:
                if typical[rank] > _TIMES_SLOWER * middle and typical[rank] - middle > behind:
                    slow[rank] = (typical[rank], middle)
        new = {rank: times for rank, times in slow.items() if rank not in self._named}
        self._named |= set(slow)
        return new
