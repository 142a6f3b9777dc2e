"""`Selection`: which models of a run are the best so far, and whether it is time to stop.

It learns from measurements, which are the same on all ranks, so every rank comes to the same conclusion by itself.
What it knows is part of every checkpoint and snapshot. Which models were the best is read off the commit log after a
restore: a model that was found to be one of them, and wasn't committed, is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dtrain.criteria import Best, EarlyStop, better


class Selection:
    """One rank's.

    :ivar best: value and step of the best models, the best one first.
    :ivar measured: what was measured last, by name; empty before.
    :ivar measured_at: the step that it was measured after.
    :ivar ended: why the run is over; empty as long as it isn't.
    """

    def __init__(self, best: Best | None, stop: EarlyStop | None) -> None:
        self._best = best
        self._stop = stop
        self.best: list[tuple[float, int]] = []
        self.measured: dict[str, float] = {}
        self.measured_at = 0
        self.ended = ""
        self._goal: float | None = None
        """The best value that early stopping has seen."""
        self._without = 0
        """Measurements since."""

    def learn(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in what was measured after a step. :returns: whether that is one of the best models now."""
        if step != self.measured_at:
            self.measured, self.measured_at = {}, step
        stop = self._stop
        # One measurement of a step counts, though it may be saved as well.
        if stop is not None and stop.metric in metrics and stop.metric not in self.measured and not self.ended:
            self.ended = self._judge(stop, metrics[stop.metric])
        self.measured |= metrics
        return self.rank(step, metrics)

    def rank(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Have a model among the best, if it is one of them. :returns: whether it is."""
        best = self._best
        if best is None or best.metric not in metrics or not math.isfinite(metrics[best.metric]):
            return False
        sign = 1.0 if best.mode == "min" else -1.0
        found = [(value, at) for value, at in self.best if at != step] + [(metrics[best.metric], step)]
        self.best = sorted(found, key=lambda one: (sign * one[0], one[1]))[: best.k]
        return any(at == step for _, at in self.best)

    def _judge(self, stop: EarlyStop, value: float) -> str:
        """:returns: why the run is over; empty if it isn't."""
        if math.isfinite(value) and (self._goal is None or better(value, self._goal, stop.mode, stop.min_delta)):
            self._goal, self._without = value, 0
        else:
            self._without += 1
        if stop.threshold is not None and math.isfinite(value) and not better(stop.threshold, value, stop.mode):
            return f"{stop.metric} is {value:g}, and {stop.threshold:g} is good enough"
        if self._without >= stop.patience:
            best = "was never a number" if self._goal is None else f"was {self._goal:g} at its best"
            return f"{stop.metric} {best}, and has not been better in {self._without} measurements since"
        return ""

    def state(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {
            "best": [list(one) for one in self.best],
            "by": None if self._best is None else asdict(self._best),
            "until": None if self._stop is None else asdict(self._stop),
            "measured": self.measured,
            "measured_at": self.measured_at,
            "ended": self.ended,
            "goal": self._goal,
            "without": self._without,
        }

    def load(self, state: Mapping[str, Any], committed: Sequence[tuple[float, int]], *, resume: bool) -> None:
        """Go on from a state that was saved.

        :param committed: the best models that are in the log.
        :param resume: not to stop for what was found before.
        """
        self.best = list(committed)
        self.measured, self.measured_at = dict(state["measured"]), state["measured_at"]
        self.ended = state["ended"]
        if state["until"] == self.state()["until"]:  # what was counted for another criterion says nothing for this one
            self._goal, self._without = state["goal"], state["without"]
        if resume and self.ended:
            self.ended, self._without = "", 0


def uncommitted(state: Mapping[str, Any], committed: set[int]) -> list[int]:
    """The steps of the best models that a state knows of and that were never committed.

    :param committed: the steps that ever were, with what was measured.
    """
    return [step for _, step in state["best"] if step not in committed]
