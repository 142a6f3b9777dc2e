"""`Config`: what a run is to do, apart from the user's own code.

A run folder remembers the options that its results depend on (`SAME_BITS`); starting it again with others is an error
that names them. All the other options may change from start to start.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import ConfigError

Unit = Literal["steps", "seconds", "epochs"]

SAME_BITS = ("global_batch", "micro_batch", "seed")
"""The options that decide what is computed: equal in every start of a run."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """A distance between two saves, such as 100 steps, 90 seconds or 1 epoch."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: int | str) -> Interval:
        """Read `100` (steps), `"90s"`, `"10m"`, `"2h"`, `"1 epoch"`, `"200 steps"`.

        :raises ConfigError: it is none of these, or not above zero.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|steps?|s|m|h|epochs?)", str(text).strip())
        if match is None or isinstance(text, bool):
            raise ConfigError(
                f"save_every={text!r} is no interval; write a number of steps (200), "
                "or a text such as '90s', '10m', '2h' or '1 epoch'"
            )
        amount, unit = float(match[1]), match[2]
        if amount <= 0:
            raise ConfigError(f"save_every={text!r} must be above zero")
        if unit in _SECONDS:
            return cls(amount * _SECONDS[unit], "seconds")
        if amount != int(amount):
            raise ConfigError(f"save_every={text!r}: steps and epochs are whole numbers")
        return cls(amount, "epochs" if unit.startswith("epoch") else "steps")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run."""

    dir: str
    """The run folder, on a local or shared disk. It is created if it isn't there, and continued if it is."""

    global_batch: int
    """Samples in one optimizer step, over all ranks."""

    micro_batch: int
    """Samples in one forward and backward pass. A step is a list of `global_batch / micro_batch` of them."""

    seed: int = 0
    """Decides the order of the samples and every random number of the training."""

    save_every: int | str = "10m"
    """Distance between two checkpoints: a number of steps, or `"90s"`, `"10m"`, `"2h"`, `"1 epoch"`. There is
    always one more at the end of the run."""

    keep_last: int = 3
    """How many checkpoints are kept, at least 2: should the newest be damaged, there is one to go back to."""

    max_stalled: int = 3
    """The run stops after so many generations in a row that ended without a new step."""

    timeout_s: float = 600.0
    """How long a rank waits for the others in one collective operation before it gives up, in seconds."""

    unit: str = "samples"
    """What `count` counts, for the progress line."""

    def __new__(cls, **options: Any) -> Config:
        # Before the generated __init__, whose TypeError would not say what was meant.
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.dir, str | Path) or not str(self.dir):
            raise ConfigError(f"dir={self.dir!r} must be the path of a folder")
        if "://" in str(self.dir):
            raise ConfigError(f"dir={self.dir!r}: only folders on a local or shared disk are supported yet")
        object.__setattr__(self, "dir", str(Path(self.dir).expanduser().absolute()))
        for name, least in (("global_batch", 1), ("micro_batch", 1), ("keep_last", 2), ("max_stalled", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number, {least} or more")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"global_batch={self.global_batch} is no multiple of micro_batch={self.micro_batch}; "
                "a step is a list of whole micro-batches"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s!r} must be above zero")
        Interval.parse(self.save_every)

    @property
    def micro_batches(self) -> int:
        """The length of the list of micro-batches that makes a step."""
        return self.global_batch // self.micro_batch

    def check_world(self, world_size: int) -> None:
        """:raises ConfigError: there are more ranks than micro-batches, so that some would have nothing to do."""
        if world_size > self.micro_batches:
            raise ConfigError(
                f"{world_size} ranks share {self.micro_batches} micro-batches (global_batch={self.global_batch} / "
                f"micro_batch={self.micro_batch}): start at most {self.micro_batches} ranks, or make micro_batch "
                "smaller or global_batch larger"
            )
