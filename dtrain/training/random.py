"""Random numbers that follow from the seed and the place in the training, and from nothing else.

There is no generator state to save: before every micro-batch, and before what comes between them, the generators are
set by (seed, step, number of the micro-batch). So a step computes the same whatever was computed before it in the
process, and whichever rank a micro-batch falls to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import xxhash


def derive(*place: int | str) -> int:
    """A number of 63 bits that follows from a place, and looks unlike that of any other place."""
    text = "/".join(map(str, place))
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def set_generators(*place: int | str) -> None:
    """Set the generators of torch (CPU and, where there is one, GPU), numpy and Python."""
    seed = derive(*place)
    # Not torch.manual_seed, which asks for every kind of device that there could be: half a millisecond a call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn inside leaves no trace: all generators stand afterwards where they stood."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, vectors = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(vectors)
