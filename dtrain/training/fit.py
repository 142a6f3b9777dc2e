"""`fit`: the usual training loop, for whom it is enough: an optimizer, a loss, and held-out data now and then.

def main(run: dtrain.Run) -> None:
    model = run.parallelize(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    dtrain.fit(run, model, optimizer, training, loss=dtrain.Mean(F.cross_entropy), epochs=10, val=held_out)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from dtrain.config import Interval
from dtrain.errors import UsageError
from dtrain.training.data import Collate, Dataset, MapData, is_map_style
from dtrain.training.ema import EMA
from dtrain.training.evaluate import Mean, Metric, Outputs, pair
from dtrain.training.run import Run
from dtrain.training.stream import Stream

AfterEvaluation = Callable[[int, dict[str, Any]], None]


def fit(
    run: Run,
    model: nn.Module,
    optimizer: Optimizer,
    data: Dataset | Iterable[Any],
    *,
    loss: Mean,
    steps: int | None = None,
    epochs: float | None = None,
    schedulers: Iterable[LRScheduler] | LRScheduler = (),
    clip: float | None = None,
    val: Dataset | None = None,
    metrics: Mapping[str, Metric] | None = None,
    evaluate_every: int | str = "1 epoch",
    average: EMA | None = None,
    outputs: Outputs = pair,
    collate: Collate = default_collate,
    workers: int = 0,
    evaluated: AfterEvaluation | None = None,
) -> dict[str, Any]:
    """Train a model to the end of the run. All ranks must reach it. It tracks what it is given.

    :param model: as `run.parallelize` gave it.
    :param data: what is trained on, as for `run.data`.
    :param loss: as in `dtrain.Mean(F.cross_entropy)`. It is also measured on `val`, as `val/loss`.
    :param steps: how many, or
    :param epochs: passes over the data, rounded up to whole steps.
    :param schedulers: of the learning rate; each takes a step after every one of the optimizer's.
    :param clip: the largest norm of the gradient.
    :param val: held-out data.
    :param metrics: measured on it besides, as for `run.evaluate`.
    :param evaluate_every: distance between two measurements, in steps (200) or epochs ("1 epoch"); there is one more at
        the end.
    :param average: averaged weights, which are measured in the place of the model's.
    :param outputs: what loss and metrics are given, made of model and batch; by default, `(model(inputs), targets)`.
    :param evaluated: called after each measurement, with the step and what was measured.
    :returns: what was measured last; empty if nothing was in this start of the run.
    :raises UsageError: it isn't said how long to train, or how often to measure.
    """
    if not isinstance(loss, Mean):
        raise UsageError(f"fit(loss={loss!r}) must be a dtrain.Mean, as in dtrain.Mean(F.cross_entropy)")
    if not isinstance(metrics, Mapping | None):
        raise UsageError(f"fit(metrics=...) takes metrics by name, such as {{'accuracy': ...}}, and no {type(metrics)}")
    if epochs is not None and not (isinstance(epochs, int | float) and 0 < epochs < math.inf):
        raise UsageError(f"fit(epochs={epochs!r}) must be a number above 0")
    if isinstance(schedulers, LRScheduler):
        schedulers = (schedulers,)
    if (steps is None) == (epochs is None):
        raise UsageError(f"fit(steps={steps}, epochs={epochs}): give one of them")
    every = Interval.parse(evaluate_every, "evaluate_every")
    if every.unit not in ("steps", "epochs"):
        raise UsageError(f"fit(evaluate_every={evaluate_every!r}) takes steps or epochs, which come at the same place")
    if isinstance(data, MapData | Stream):
        raise UsageError("fit(data=run.data(...)): fit makes run.data itself; give it the data set")
    if not is_map_style(data) and (epochs is not None or (val is not None and every.unit == "epochs")):
        raise UsageError("fit: an iterable data set has no epochs; give steps=, and evaluate_every= in steps")
    batch = run.config.global_batch
    length = len(data) if is_map_style(data) else 0
    total = steps if steps is not None else math.ceil(round((epochs or 0) * length / batch, 6))
    schedules = tuple(schedulers)
    source = run.data(data, collate=collate, workers=workers)
    tracked = {"model": model, "optimizer": optimizer} | ({} if average is None else {"ema": average})
    run.track(**tracked, **{f"schedule_{number}": schedule for number, schedule in enumerate(schedules)})

    def due(step: int) -> bool:
        size = int(every.amount)
        if every.unit == "steps":
            return step % size == 0
        return step * batch // length // size > (step - 1) * batch // length // size

    found: dict[str, Any] = {}
    for step in run.steps(total):
        for inputs in step.micro_batches(source):
            made = outputs(model, inputs)
            if not isinstance(made, tuple):
                raise UsageError(f"fit: outputs gave a {type(made).__qualname__}; it gives a tuple: (outputs, targets)")
            value, count = loss.sum(*made)
            step.backward(value, count=count)
        step.update(optimizer, *schedules, clip=clip)
        if val is not None and (due(step.number) or step.number == total):
            measured: dict[str, Metric] = {"loss": loss} | dict(metrics or {})
            found = run.evaluate(model, val, measured, outputs=outputs, collate=collate, average=average)
            if evaluated is not None:
                evaluated(step.number, found)
    return found
