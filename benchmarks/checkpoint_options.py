"""What `checkpoint.py` can be told."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

PARTS = ("stall", "durable", "load", "beside", "memory", "planning")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure saving and loading; lists are given with commas."""

    sizes: str = "256,2048"
    """MiB of state, over all ranks together."""

    ranks: str = "1,2"
    """Processes."""

    targets: str = "memory,disk"
    """Where it is saved: `memory` is a folder in /dev/shm, `disk` one in `--disk`."""

    disk: Path = Path(tempfile.gettempdir())
    """A folder on a real disk; what is written there is deleted again."""

    rounds: int = 3
    """Saves and loads by each, after one that isn't counted."""

    parts: str = ",".join(PARTS)
    """What to measure."""

    layout: str = "sharded"
    """`sharded` or `replicated`, with two ranks and more."""

    quick: bool = False
    """256 MiB, one rank, and the disk only; without the planning."""

    def wanted(self, *parts: str) -> bool:
        return any(part in self.parts.split(",") for part in parts)
