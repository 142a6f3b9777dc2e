"""The share of time that goes into steps that count, while processes are killed: dtrain beside a job written by hand.

Both train the GPT of dtrain.examples.gpt for as long, and save every 10 steps; a rank, chosen by chance, is killed
every 20 seconds on average, at the same times for both. A step counts once, however often it was done. What is compared
with the clock is the number of steps that count, times the median time of a step.

    python benchmarks/goodput.py
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass

import tyro
from recovery import ByHand, Dtrain, Job, running, wait_for


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and kill for some minutes, by dtrain and by hand."""

    minutes: float = 10.0
    """For each."""

    every_s: float = 20.0
    """From one kill to the next, on average."""

    seed: int = 0
    """Chooses the ranks and the times."""


def goodput(kind: type[Job], o: Options) -> tuple[float, int, int, float]:
    """:returns: the share, how many kills there were, steps that count, and the median time of a step."""
    dice = random.Random(o.seed)
    kills = 0
    with running(kind) as job:
        wait_for(lambda: len(job.steps()) > 5, "the first steps")
        begun, first = job.steps()[-1]
        end = begun + 60 * o.minutes
        at = begun
        while (at := at + dice.expovariate(1 / o.every_s)) < end:
            rank = dice.randrange(2)
            time.sleep(max(0.0, at - time.time()))
            with contextlib.suppress(ProcessLookupError, KeyError):  # it has been killed just before, and isn't back
                os.kill(job.pids()[rank], signal.SIGKILL)
                kills += 1
        time.sleep(max(0.0, end - time.time()))
        lines = [line for line in job.steps() if begun <= line[0] <= end]
    step_s = statistics.median(b[0] - a[0] for a, b in itertools.pairwise(lines) if b[1] == a[1] + 1)
    steps = max(step for _, step in lines) - first
    return steps * step_s / (end - begun), kills, steps, step_s


def main(o: Options) -> None:
    print(f"{o.minutes:g} minutes each, a kill every {o.every_s:g} s on average, 2 processes, seed {o.seed}")
    for name, kind in (("dtrain", Dtrain), ("by hand", ByHand)):
        share, kills, steps, step_s = goodput(kind, o)
        print(
            f"{name:8} {share:6.1%} of the time in {steps} steps that count, of {1000 * step_s:.0f} ms; {kills} kills"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Options))
