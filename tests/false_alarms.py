"""A training on three nodes, on a machine that is busy with other things: nobody may be taken for dead or for hanging.

python -m tests.false_alarms --minutes 30
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.elastic.process import die_with
from tests.cluster import Cluster, cluster

STEPS = 10**6
"""More than there is time for."""
NODES = 3


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Each keeps a processor busy."""
    die = functools.partial(die_with, os.getpid())
    running = [subprocess.Popen([sys.executable, "-c", "while 1: 0"], preexec_fn=die) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def alarms(job: Cluster) -> list[str]:
    """What was raised: every start but the first of each rank follows from one."""
    found = [str(event["cause"]) for kind in ("lost", "failed") for event in job.events(kind)]
    again = len(job.events("started")) - NODES
    return found + ([f"{again} ranks started again"] if again else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long to look")
    minutes = parser.parse_args().minutes
    cores = os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory(prefix="dtrain-alarms-") as name,
        busy(cores),
        cluster(Path(name), least=NODES - 1, most=NODES, steps=STEPS) as job,
    ):
        begun, first, load = time.monotonic(), job.step(), 0.0
        while (lasted := time.monotonic() - begun) < 60 * minutes:
            time.sleep(1)
            load = max(load, os.getloadavg()[0])
            if wrong := alarms(job):
                print(f"after {lasted:.0f} s: FALSE ALARM: {'; '.join(wrong)}\n{job.said()[-6000:]}", flush=True)
                return 1
        job.until_new_steps()
        steps = job.step() - first
        print(
            f"no alarm in {lasted / 60:.0f} min: {steps} steps on {NODES} nodes, {cores} cores, load up to {load:.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
