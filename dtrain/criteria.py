"""What a run goes by, besides its steps: which model is the best, when it is enough, and what is taken for garbage.

Each is an option of `Config`, and checks itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dtrain.errors import ConfigError

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Best:
    """The best checkpoints by a metric. Of equals the older one is the better; what isn't finite is never the best.

    :raises ConfigError: an option can't be right.
    """

    metric: str
    """A name that `run.evaluate` gives, such as `"val/loss"`, or that is given to `run.save(metrics=...)`."""

    mode: Mode = "min"
    """Whether less of it is better, or more."""

    k: int = 1
    """How many of them."""

    on_training: bool = False
    """Go by a metric of the data that is trained on, which says nothing about other data."""

    def __post_init__(self) -> None:
        _check(self)
        _check_count("Best", "k", self.k)


@dataclass(frozen=True)
class EarlyStop:
    """The end of a run whose metric doesn't get better any more, or is good enough.

    :raises ConfigError: an option can't be right.
    """

    metric: str
    """As in `Best`."""

    mode: Mode = "min"
    """Whether less of it is better, or more."""

    patience: int = 5
    """The run ends after so many measurements in a row that are no better than the best before."""

    min_delta: float = 0.0
    """Better means by more than this."""

    threshold: float | None = None
    """The run also ends when the metric is as good as this, or better."""

    on_training: bool = False
    """As in `Best`."""

    def __post_init__(self) -> None:
        _check(self)
        _check_count("EarlyStop", "patience", self.patience)
        _check_number("EarlyStop", "min_delta", self.min_delta, least=0.0)
        if self.threshold is not None:
            _check_number("EarlyStop", "threshold", self.threshold)


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What is looked at in every step, and what is done about it.

    :raises ConfigError: an option can't be right.
    """

    nonfinite: Literal["stop", "skip", "rollback", "off"] = "stop"
    """What to do in a step whose loss or gradient is NaN or infinite. The optimizer never sees such a gradient, but for
    `"off"`. `"stop"` ends the run; `"skip"` leaves the step out and goes on; `"rollback"` goes back to the last
    checkpoint and passes over the step when it comes to it again."""

    most_in_a_row: int = 3
    """So many steps in a row may be left out, by whatever guard; one more ends the run."""

    loss_spike: Literal["warn", "rollback", "off"] = "warn"
    """What to do in a step whose loss is far above those before it: say so, or as with `nonfinite`."""

    spike_score: float = 12.0
    """How far: in standard deviations of the losses before it, as estimated from their median absolute deviation."""

    spike_window: int = 64
    """How many losses are looked back at."""

    compare_every: int | None = 100
    """Distance in steps between two comparisons of the ranks' copies of the parameters, under DDP and HSDP. They are
    also compared before each snapshot and checkpoint. None compares nothing."""

    verify_restore: bool = False
    """Compute the first step after each restore twice, and compare: a machine that computes other numbers the second
    time is found before it trains. It takes a second copy of the state for that step."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("nonfinite", ("stop", "skip", "rollback", "off")),
            ("loss_spike", ("warn", "rollback", "off")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"Guards({name}={getattr(self, name)!r}) must be one of {', '.join(map(repr, choices))}"
                )
        _check_count("Guards", "most_in_a_row", self.most_in_a_row)
        _check_count("Guards", "spike_window", self.spike_window, least=8)
        _check_number("Guards", "spike_score", self.spike_score, least=1.0)
        if self.compare_every is not None:
            _check_count("Guards", "compare_every", self.compare_every)
        if not isinstance(self.verify_restore, bool):
            raise ConfigError(f"Guards(verify_restore={self.verify_restore!r}) must be True or False")


def better(value: float, than: float, mode: Mode, by: float = 0.0) -> bool:
    """Whether a metric has a better value, by more than so much."""
    return value < than - by if mode == "min" else value > than + by


def _check(criterion: Best | EarlyStop) -> None:
    kind, metric = type(criterion).__name__, criterion.metric
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"{kind}({metric!r}) must be the name of a metric, such as 'val/loss'")
    if criterion.mode not in ("min", "max"):
        raise ConfigError(f"{kind}(mode={criterion.mode!r}) must be 'min' or 'max'")
    if (metric == "loss" or metric.startswith("train")) and not criterion.on_training:
        raise ConfigError(
            f"{kind}({metric!r}): that is measured on the data that is trained on, where the model that knows it by "
            "heart is the best; name a metric of run.evaluate, or add on_training=True"
        )


def _check_count(kind: str, name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{kind}({name}={value!r}) must be a whole number, {least} or more")


def _check_number(kind: str, name: str, value: object, least: float = -math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f", {least:g} or more"
        raise ConfigError(f"{kind}({name}={value!r}) must be a number{bound}")
