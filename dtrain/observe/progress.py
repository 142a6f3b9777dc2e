"""The line that shows where a run is: step, loss, speed, time left, last commit.

On a terminal it is one line that is drawn again; in a log file, a line every half minute.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from dtrain.observe.events import say

_LOG_EVERY_S = 30.0


def bytes_bar(total: int | None, what: str) -> tqdm[Any]:
    """For what is copied: on a terminal only."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty())


class Progress:
    """Shown by one rank.

    :param done: steps that are behind us.
    :param committed: the step of the newest checkpoint.
    :param total: steps of the whole run.
    :param unit: what is counted for the speed.
    """

    def __init__(self, done: int, total: int, unit: str, committed: int) -> None:
        self._total = total
        self._unit = unit
        self._committed = committed
        self._loss = ""
        self._count = 0.0
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            leave=True,
            disable=not sys.stderr.isatty(),
            # tqdm puts a comma before the postfix; the bar takes what room is left in the line.
            bar_format="step {n_fmt}/{total_fmt}{postfix}, {remaining} left |{bar}|",
        )

    def step(self, step: int, loss: float, count: float) -> None:
        """A step is done: its mean loss, and how much it counted."""
        self._count += count
        self._loss = f"loss {loss:.4f}"
        text = self._text()
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif time.monotonic() - self._logged > _LOG_EVERY_S:
            self._logged = time.monotonic()
            say(f"step {step}/{self._total}, {text}")

    def committed(self, step: int) -> None:
        """The newest commit is that of this step; 0 if there was none in this start of the run."""
        self._committed = max(self._committed, step)

    def close(self) -> None:
        self._bar.close()

    def _text(self) -> str:
        rate = self._count / max(time.monotonic() - self._started, 1e-9)
        speed = f"{rate / 1000:.1f}k" if rate >= 10_000 else f"{rate:.0f}"
        commit = f"committed {self._committed}" if self._committed else "nothing committed"
        return f"{self._loss}, {speed} {self._unit}/s, {commit}"
