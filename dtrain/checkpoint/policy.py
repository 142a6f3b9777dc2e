"""What to keep: small rules that add up.

    Keep(last=3, every=1000, younger_s=7200, best=Best("val/loss", k=3))

A checkpoint is kept as long as any of the rules says so, and the newest two good ones always are: should the newest be
damaged, there is one to go back to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.checkpoint.log import Entry, Log
from dtrain.criteria import Best

_LEAST = 2


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints are kept."""

    last: int = 3
    """So many of the newest ones."""
    every: int | None = None
    """Those of every so many steps, for ever: 1000 keeps the first one at or after step 1000, 2000, ..."""
    younger_s: float | None = None
    """Those that were committed less than so many seconds ago."""
    best: Best | None = None
    """The best ones by a metric."""


def to_retire(log: Log, keep: Keep, now: float) -> list[Entry]:
    """The commits that are to be deleted.

    One that was found bad is kept as long as a good one of its age would be, and until there are enough good ones: it
    may only have been out of reach.
    """
    good, failed = log.commits(), log.found_bad()
    newest = sorted(_copies(good).values(), key=lambda entry: entry.number)[-max(keep.last, _LEAST) :]
    if not newest:
        return []
    kept = {entry.number for entry in newest} | _chosen(good, keep, now)
    kept |= _chosen(sorted([*good, *failed], key=lambda entry: entry.number), keep, now)  # as if all were good
    enough = len(newest) == max(keep.last, _LEAST)
    failed = [entry for entry in failed if enough and entry.number < newest[0].number]
    return [entry for entry in (*good, *failed) if entry.number not in kept]


def _copies(commits: list[Entry]) -> dict[int, Entry]:
    """By step; of one that was committed twice, the later one."""
    return {entry.step: entry for entry in commits}


def _chosen(commits: list[Entry], keep: Keep, now: float) -> set[int]:
    """The numbers of those that are kept whatever their age among the others."""
    kept: set[int] = set()
    if keep.every is not None:
        passed = 0
        for step, entry in sorted(_copies(commits).items()):
            if step // keep.every > passed:
                kept.add(entry.number)
            passed = step // keep.every
    if keep.younger_s is not None:
        kept |= {entry.number for entry in commits if now - entry.time < keep.younger_s}
    if keep.best is not None:
        kept |= {entry.number for entry in best_of(commits, keep.best)}
    return kept


def best_of(commits: list[Entry], best: Best) -> list[Entry]:
    """The best commits by a metric, the best one first. Of equals, the older is the better; what isn't finite is none.

    A step that was committed twice counts once.
    """
    sign = 1.0 if best.mode == "min" else -1.0
    found = {entry.step: entry for entry in commits if math.isfinite(entry.metrics.get(best.metric, math.nan))}
    return sorted(found.values(), key=lambda entry: (sign * entry.metrics[best.metric], entry.step))[: best.k]
