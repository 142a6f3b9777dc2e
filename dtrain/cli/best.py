"""`dtrain checkpoint best`: the checkpoints of a run, ranked by a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.policy import best_of
from dtrain.checkpoint.ranking import criterion_of
from dtrain.cli.table import local_time, print_json, print_table, width
from dtrain.cli.transfer import RunArg, StorageOptions, open_run
from dtrain.criteria import Best as Criterion
from dtrain.criteria import Mode
from dtrain.errors import StateError
from dtrain.storage.base import Storage

_WIDE, _COLUMN = 90, 16
"""Columns that the table takes in a terminal, and that each other metric does."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """Show the checkpoints that have a metric, the best one first.

    By default it is the metric that the run goes by (`Config.keep_best`). The exit code is 1 if it is finite in none,
    and 2 if none has it.
    """

    folder: RunArg

    metric: str | None = None
    """Go by this one instead, such as val/loss."""

    mode: Mode | None = None
    """Whether less of it is better, or more; with a metric."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: a list of {step, value, metrics, time, attempt}."""

    def run(self) -> int:
        storage, log = open_run(self.folder, self.storage_option)
        criterion = self._criterion(storage, log)
        found = best_of(log.commits() or log.found_bad(), criterion)
        others = sorted({name for entry in found for name in entry.metrics} - {criterion.metric})
        if self.json:
            print_json([_row(entry, criterion) for entry in found])
        elif found:
            room = width()
            fits = room is None or len(others) * _COLUMN + _WIDE <= room
            names = [criterion.metric, *(others if fits else ())]
            print_table(
                ["", "step", *names, "committed", "attempt"],
                [
                    [
                        str(place),
                        str(entry.step),
                        *(f"{entry.metrics[name]:.6g}" if name in entry.metrics else "-" for name in names),
                        local_time(entry.time),
                        entry.attempt,
                    ]
                    for place, entry in enumerate(found, 1)
                ],
                right=("", "step", *names),
            )
            if not fits:
                print(f"(there is no room for {', '.join(others)}; --json shows all)")
        else:
            print(f"no checkpoint of {self.folder} has {criterion.metric}")
        return 0 if found else 1

    def _criterion(self, storage: Storage, log: Log) -> Criterion:
        """:raises StateError: it isn't known what to go by."""
        known = sorted({name for entry in log.commits() or log.found_bad() for name in entry.metrics})
        if not known:
            raise StateError(
                f"{self.folder}: none of its checkpoints has a metric: they come from run.evaluate or "
                "run.save(metrics=...)"
            )
        by = criterion_of(storage, log)
        metric, mode = self.metric or (by.metric if by else None), self.mode
        if mode is None and by is not None and by.metric == metric:
            mode = by.mode
        if metric is not None and metric not in known:
            raise StateError(f"{self.folder}: no checkpoint has {metric!r}; they have: {', '.join(known)}")
        if metric is None or mode is None:
            what = "which metric" if metric is None else f"whether more of {metric}"
            raise StateError(
                f"{self.folder}: the run doesn't say {what} is better; give --metric and --mode (its checkpoints have: "
                f"{', '.join(known)})"
            )
        return Criterion(metric, mode, k=max(1, len(log.commits())), on_training=True)


def _row(entry: Entry, criterion: Criterion) -> dict[str, Any]:
    metrics = {name: value if math.isfinite(value) else None for name, value in entry.metrics.items()}
    return {
        "step": entry.step,
        "value": entry.metrics[criterion.metric],
        "metrics": metrics,
        "time": entry.time,
        "attempt": entry.attempt,
    }
