"""Random numbers that follow from the seed and the place in the training, and from nothing else.

There is no generator state to save: before every micro-batch, and before what comes between them, the generators are
set by (seed, step, number of the micro-batch). So a step computes the same whatever was computed before it in the
process, and whichever rank a micro-batch falls to.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import xxhash


def derive(*place: int | str) -> int:
    """A number of 63 bits that follows from a place, and looks unlike that of any other place."""
    text = "/".join(map(str, place))
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def set_generators(*place: int | str) -> None:
    """Set the generators of torch (all devices), numpy and Python."""
    seed = derive(*place)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
