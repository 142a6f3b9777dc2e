"""The share of time that goes into steps that count, while processes are killed: dtrain beside others.

All train the GPT of dtrain.examples.gpt for as long, and save every 10 steps; a rank, chosen by chance, is killed
every 20 seconds on average, at the same times for all. A step counts once, however often it was done. What is compared
with the clock is the number of steps that count, times the median time of a step. The jobs are those of `recovery.py`;
a step that torchft has done with one of two replicas counts as half of one.

    python benchmarks/goodput.py
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass

import tyro
from recovery import JOBS, Job, running, wait_for


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train and kill for some minutes, by dtrain and by others."""

    jobs: str = "dtrain,by hand,Fabric,torchft"
    """See `recovery.py`."""

    minutes: float = 10.0
    """For each."""

    every_s: float = 20.0
    """From one kill to the next, on average."""

    seed: int = 0
    """Chooses the ranks and the times."""


def goodput(kind: type[Job], o: Options) -> tuple[float, int, float, float]:
    """:returns: the share, how many kills there were, steps that count, and the median time of a step."""
    dice = random.Random(o.seed)
    kills = 0
    with running(kind) as job:
        wait_for(lambda: len(job.steps()) > 5, "the first steps")
        begun = job.steps()[-1][0]
        end = begun + 60 * o.minutes
        at = begun
        while (at := at + dice.expovariate(1 / o.every_s)) < end:
            rank = dice.randrange(2)
            time.sleep(max(0.0, at - time.time()))
            with contextlib.suppress(ProcessLookupError, KeyError):  # it has been killed just before, and isn't back
                os.kill(job.pids()[rank], signal.SIGKILL)
                kills += 1
        time.sleep(max(0.0, end - time.time()))
        steps, step_s = job.counted(begun, end), statistics.median(job.step_times())
    return steps * step_s / (end - begun), kills, steps, step_s


def main(o: Options) -> None:
    print(f"{o.minutes:g} minutes each, a kill every {o.every_s:g} s on average, 2 processes, seed {o.seed}")
    for name in o.jobs.split(","):
        share, kills, steps, step_s = goodput(JOBS[name], o)
        print(
            f"{name:8} {share:6.1%} of the time in {steps:.0f} steps that count, of {1000 * step_s:.0f} ms; "
            f"{kills} kills"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Options))
