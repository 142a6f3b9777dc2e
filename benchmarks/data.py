"""What it costs to find the samples of a micro-batch, anywhere in the epochs of a large data set.

Beside it, what PyTorch's own shuffle takes for the same: a permutation of all samples, drawn anew in each epoch, of
which the part before the place is thrown away.

    python benchmarks/data.py
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from dtrain.training.order import Order


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time seeks."""

    samples: int = 1_000_000_000
    """In the data set."""

    batch: int = 32
    """Samples in a micro-batch."""

    seeks: int = 2000
    """How many are timed."""

    peer_samples: int = 100_000_000
    """For PyTorch's shuffle, whose table takes 8 bytes a sample."""


def ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def main(o: Options) -> None:
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"python benchmarks/data.py {' '.join(sys.argv[1:])}".rstrip())
    order, dice = Order(o.samples, seed=0, shuffle=True), random.Random(0)
    order.ids(0, o.batch)
    places = [dice.randrange(100 * o.samples) for _ in range(o.seeks)]
    tracemalloc.start()
    for place in places[:100]:
        order.ids(place, place + o.batch)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    taken = [ms(lambda place=place: order.ids(place, place + o.batch)) for place in places]  # type: ignore[misc]
    print(f"\na seek to {o.batch} of {o.samples:,} samples, at any place of 100 epochs:")
    worst = statistics.quantiles(taken, n=100)[98]
    print(f"  dtrain            {statistics.median(taken):8.3f} ms, {worst:.3f} at the 99th percentile")
    print(f"                    {most / 1024:8.1f} KiB")
    table = ms(lambda: torch.randperm(o.peer_samples))
    print(f"  torch.randperm    {table:8.0f} ms, {8 * o.peer_samples >> 20} MiB, for {o.peer_samples:,} samples")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
