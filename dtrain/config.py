"""`Config`: what a run is to do, apart from the user's own code.

A run folder remembers the options that its results depend on (`SAME_BITS`); starting it again with others is an error
that names them. All the other options may change from start to start.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.criteria import Best, EarlyStop, Guards
from dtrain.errors import ConfigError
from dtrain.storage.base import Storage
from dtrain.storage.places import is_remote, on_disk, storage_at

Unit = Literal["steps", "seconds", "epochs", "auto"]

SAME_BITS = ("global_batch", "micro_batch", "seed", "precision", "reduction", "tf32")
"""The options that decide what is computed: equal in every start of a run."""

_STATE = Path("~/.local/state/dtrain")
"""Where the local parts of runs on a bucket lie."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """A distance between two saves, such as 100 steps, 90 seconds or 1 epoch; or `auto`, which is worked out anew."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: int | str, option: str = "save_every") -> Interval:
        """Read `100` (steps), `"90s"`, `"10m"`, `"2h"`, `"1 epoch"`, `"200 steps"`, `"auto"`.

        :param option: which one it is, for the messages.
        :raises ConfigError: it is none of these, or not above zero.
        """
        if text == "auto":
            return cls(0, "auto")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|steps?|s|m|h|epochs?)", str(text).strip())
        if match is None or isinstance(text, bool):
            raise ConfigError(
                f"{option}={text!r} is no interval; write a number of steps (200), "
                "or a text such as '90s', '10m', '2h', '1 epoch' or 'auto'"
            )
        amount, unit = float(match[1]), match[2]
        if amount <= 0:
            raise ConfigError(f"{option}={text!r} must be above zero")
        if unit in _SECONDS:
            return cls(amount * _SECONDS[unit], "seconds")
        if amount != int(amount):
            raise ConfigError(f"{option}={text!r}: steps and epochs are whole numbers")
        return cls(amount, "epochs" if unit.startswith("epoch") else "steps")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a run."""

    dir: str
    """The run folder, on a local or shared disk, or a URL such as `s3://bucket/runs/x`. It is created if it isn't
    there, and continued if it is."""

    global_batch: int
    """Samples in one optimizer step, over all ranks."""

    micro_batch: int
    """Samples in one forward and backward pass. A step is a list of `global_batch / micro_batch` of them."""

    seed: int = 0
    """Decides the order of the samples and every random number of the training."""

    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "ddp"
    """How a model is spread over the ranks: a copy on each (DDP), a part on each (FSDP2), a copy on each of several
    groups of ranks that have a part each (HSDP); `"none"` is for a single process. It may change between starts."""

    shard_size: int | None = None
    """For HSDP: how many ranks share a copy, by default those of a node, and 2 at least. Where it doesn't divide the
    number of ranks, the next larger number that does."""

    tensor_parallel: int = 1
    """How many ranks compute a micro-batch together, by the function that `run.parallelize` is given for it. With FSDP
    and HSDP."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The number format of forward and backward passes. Weights, their updates and the sums of gradients are in fp32
    always; with fp16, losses are scaled by a GradScaler that is part of the checkpoint."""

    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are added up. `"exact"`: in an order that doesn't depend on the number of ranks, which gives the
    same weights, bit for bit, on any number of them, and takes deterministic algorithms only."""

    tf32: bool = False
    """Let GPUs multiply fp32 numbers with 10 bits of mantissa."""

    activation_checkpointing: Literal["none", "full", "selective"] | int = "none"
    """Which blocks of a model compute their activations again in the backward pass rather than keep them: `"full"` is
    all of them, a number k every k-th; `"selective"` keeps those that take long to compute."""

    compile: bool = False
    """Compile the blocks of each model, by `torch.compile`."""

    cpu_offload: bool = False
    """For FSDP and HSDP on GPUs: keep parameters and the optimizer's state in the memory of the host."""

    save_every: int | str = "10m"
    """Distance between two checkpoints, which is what the death of a node costs: a number of steps, `"90s"`, `"10m"`,
    `"2h"`, `"1 epoch"`, or `"auto"` for the one that costs the least, given what a save is measured to cost and
    `mtbf_hours`. There is always one more at the end of the run."""

    snapshot_every: int | str = "auto"
    """Distance between two snapshots in memory, which is what the death of a process costs: like `save_every`;
    `"auto"` takes them as often as 1% of the time allows. Every checkpoint is one as well."""

    replicate_snapshots: int = 0
    """1 also sends each snapshot to the memory of another node, beside the training: a node that is lost costs no more
    steps than a process. It takes six times a rank's share of the state, instead of twice, and so much of the network
    for each snapshot; where that takes longer than the distance between two, the training waits for it."""

    early_save: Literal["wait", "skip"] = "wait"
    """What to do when a checkpoint is due after so many steps or epochs, and the one before is still being written.
    Those that are due by the clock come when it is written."""

    mtbf_hours: float = 24.0
    """Mean time between two failures that cost more than a process, for `save_every="auto"`."""

    keep_last: int = 3
    """How many of the newest checkpoints are kept, at least 2: should one be damaged, there is one to go back to."""

    keep_every: int | None = None
    """Besides, those of every so many steps are kept for ever: of 1000, the first at or after step 1000, 2000, ..."""

    keep_for: str | None = None
    """Besides, those that are younger than this, such as `"2h"`."""

    keep_best: Best | None = None
    """Besides, the best ones by a metric, such as `Best("val/loss", k=3)`. What `run.evaluate` finds to be one of them
    is saved at once."""

    early_stop: EarlyStop | None = None
    """When the run has come as far as it gets, such as `EarlyStop("val/loss", patience=5)`. Such a run stays stopped
    when it is started again."""

    resume_stopped: bool = False
    """Go on with a run that `early_stop` has ended, with patience anew."""

    guards: Guards = field(default_factory=Guards)
    """What is done about losses and gradients that aren't finite, losses that jump, and ranks that don't agree."""

    max_stalled: int = 3
    """The run stops after so many generations in a row that ended without a new step."""

    max_failures_per_hour: int = 60
    """The run stops when more generations than so many fail within an hour, even if each comes a little further."""

    skip_poison_batch: bool = False
    """Rather than stop after `max_stalled` failures without a new step, pass over the step in which they happened, and
    record the ids of its samples."""

    hang_after_s: float | None = 60.0
    """How long a step may stand still, in seconds, before it is taken for a hang: the stacks of all ranks are written
    down, and they are started again. Ten times as long up to the end of the first step, in a validation, while a
    checkpoint is waited for, and always with `compile`; never less than ten times the longest time between two signs of
    life of late. None waits for ever."""

    grace_s: float = 25.0
    """How long after SIGTERM or SIGUSR1 the processes are killed, in seconds: in this time the step is finished and
    saved. torchrun, SLURM and Kubernetes give 30."""

    notice_file: str = ""
    """A file that somebody makes or touches when the machine is wanted back: as SIGTERM."""

    timeout_s: float = 600.0
    """How long a rank waits for the others in one collective operation before it gives up, in seconds."""

    unit: str = "samples"
    """What `count` counts, for the progress line."""

    local_dir: str = ""
    """A folder for what a bucket can't hold, where `dir` is a URL: events, metrics, and snapshots that don't fit into
    memory. By default one below `~/.local/state/dtrain`."""

    local_save_every: int | str | None = None
    """Where `dir` is a URL, the distance between two checkpoints in `local_dir`, besides those in `dir`: like
    `save_every`, but for `"auto"`. All ranks must reach that folder: they run on one machine, or it is on a shared
    disk. None makes none there."""

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    """How `dir` is reached where it is a URL. For S3: `endpoint_url`, `region`, `profile`, `path_style`, `timeout_s`
    (how long a request is tried again), `client` ("obstore" or "s3fs"); by default what the environment and the profile
    say. For other file systems: what fsspec passes on to them. Never credentials."""

    unsafe_commit: bool = False
    """Make do with a server that can't create an object exclusively. Two groups of processes that both take themselves
    for the run could then undo each other's checkpoints."""

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
        for name in ("local_dir", "notice_file", "unit"):
            if not isinstance(getattr(self, name), str | Path):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a text")
        for name in ("dir", "local_dir"):
            object.__setattr__(self, name, on_disk(getattr(self, name)))
        if is_remote(self.local_dir):
            raise ConfigError(f"local_dir={self.local_dir!r} must be a folder of this machine")
        if is_remote(self.dir):
            storage_at(self.dir)
            object.__setattr__(self, "dir", str(self.dir).rstrip("/"))
            local = self.local_dir or _STATE / "/".join(part for part in self.dir.split("/") if part).replace(":", "")
            object.__setattr__(self, "local_dir", str(Path(local).expanduser().absolute()))
        else:
            if self.local_dir and str(self.local_dir) != str(Path(self.dir).expanduser().absolute()):
                raise ConfigError(f"local_dir={self.local_dir!r} is for a dir that is a URL; leave it out")
            if self.local_save_every is not None:
                raise ConfigError(
                    f"local_save_every={self.local_save_every!r} is for a dir that is a URL; leave it out"
                )
            if self.storage_options:
                names = ", ".join(self.storage_options)
                raise ConfigError(f"storage_options ({names}) are for a dir that is a URL; leave them out")
            storage_at(self.dir)
            object.__setattr__(self, "dir", str(Path(self.dir).expanduser().absolute()))
            object.__setattr__(self, "local_dir", self.dir)
        if self.notice_file:
            object.__setattr__(self, "notice_file", str(Path(self.notice_file).expanduser().absolute()))
        self.storage()  # an option that can't be right is found here
        for name in ("global_batch", "micro_batch", "keep_last", "max_stalled", "max_failures_per_hour"):
            value, least = getattr(self, name), 2 if name == "keep_last" else 1
            if not _is_count(value, least):
                raise ConfigError(f"{name}={value!r} must be a whole number, {least} or more")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")
        if self.global_batch % self.micro_batch:
            raise ConfigError(
                f"global_batch={self.global_batch} is no multiple of micro_batch={self.micro_batch}; "
                "a step is a list of whole micro-batches"
            )
        self._check_training()
        for name in ("timeout_s", "mtbf_hours", "grace_s", "hang_after_s"):
            value = getattr(self, name)
            if value is None and name == "hang_after_s":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r} must be a number above zero")
        Interval.parse(self.save_every)
        if Interval.parse(self.snapshot_every, "snapshot_every").unit == "epochs":
            raise ConfigError(f"snapshot_every={self.snapshot_every!r} takes steps, a time or 'auto'")
        every_local = self.local_save_every
        if every_local is not None and Interval.parse(every_local, "local_save_every").unit == "auto":
            raise ConfigError("local_save_every='auto': give steps, epochs or a time")
        if self.replicate_snapshots not in (0, 1):
            raise ConfigError(f"replicate_snapshots={self.replicate_snapshots!r} must be 0 or 1")
        if self.early_save not in ("wait", "skip"):
            raise ConfigError(f"early_save={self.early_save!r} must be 'wait' or 'skip'")
        every = self.keep_every
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigError(f"keep_every={self.keep_every!r} must be a number of steps, 1 or more")
        if self.keep_for is not None and Interval.parse(self.keep_for, "keep_for").unit != "seconds":
            raise ConfigError(f"keep_for={self.keep_for!r} must be a time, such as '2h'")
        for name, kind, example in (
            ("keep_best", Best, "dtrain.Best('val/loss', k=3)"),
            ("early_stop", EarlyStop, "dtrain.EarlyStop('val/loss', patience=5)"),
            ("guards", Guards, "dtrain.Guards(nonfinite='skip')"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name != "guards"):
                raise ConfigError(f"{name}={value!r} must be a {kind.__name__}, such as {example}")

    def _check_training(self) -> None:
        for name, choices in (
            ("parallel", ("none", "ddp", "fsdp", "hsdp")),
            ("precision", ("fp32", "bf16", "fp16")),
            ("reduction", ("fast", "exact")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
        for name in ("tf32", "compile", "cpu_offload", "skip_poison_batch", "resume_stopped", "unsafe_commit"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        how = self.activation_checkpointing
        if how not in ("none", "full", "selective") and not _is_count(how):
            raise ConfigError(
                f"activation_checkpointing={how!r} must be 'none', 'full', 'selective', or a number: 2 is every second "
                "block"
            )
        if self.shard_size is not None and (self.parallel != "hsdp" or not _is_count(self.shard_size, 2)):
            raise ConfigError(f"shard_size={self.shard_size!r} must be 2 ranks or more, with parallel='hsdp'")
        if not _is_count(self.tensor_parallel):
            raise ConfigError(f"tensor_parallel={self.tensor_parallel!r} must be a number of ranks, 1 or more")
        for name, none in (("cpu_offload", False), ("tensor_parallel", 1)):
            if getattr(self, name) != none and self.parallel not in ("fsdp", "hsdp"):
                raise ConfigError(f"{name}={getattr(self, name)!r} needs parallel='fsdp' or 'hsdp'")

    @property
    def micro_batches(self) -> int:
        """The length of the list of micro-batches that makes a step."""
        return self.global_batch // self.micro_batch

    def criteria(self) -> dict[str, Best | EarlyStop]:
        """What models are chosen by, by the option that says so."""
        chosen: dict[str, Best | EarlyStop | None] = {"keep_best": self.keep_best, "early_stop": self.early_stop}
        return {option: criterion for option, criterion in chosen.items() if criterion is not None}

    def storage(self) -> Storage:
        """Of the run folder; nothing is opened yet."""
        return storage_at(self.dir, self.storage_options, unsafe_commit=self.unsafe_commit)

    def local_storage(self) -> Storage | None:
        """Of the checkpoints in `local_dir`, if any are made there."""
        return None if self.local_save_every is None else storage_at(self.local_dir)

    def check_world(self, world_size: int) -> None:
        """:raises ConfigError: there are more ranks than the config has work for."""
        if self.parallel == "none" and world_size > 1:
            raise ConfigError(
                f"parallel='none' is for one process, and {world_size} were started: take 'ddp' or 'fsdp'"
            )
        if world_size > self.micro_batches * self.tensor_parallel:
            raise ConfigError(
                f"{world_size} ranks share {self.micro_batches} micro-batches (global_batch={self.global_batch} / "
                f"micro_batch={self.micro_batch}): start at most {self.micro_batches} ranks, or make micro_batch "
                "smaller or global_batch larger"
            )


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
