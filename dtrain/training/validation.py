"""`Validation`: a run's held-out data: gone through once by all ranks together, and kept apart from the training's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import nn

from dtrain.config import Config
from dtrain.errors import UsageError
from dtrain.observe.events import Events
from dtrain.training.data import Collate, Dataset, digest_of
from dtrain.training.evaluate import Metric, Outputs, measure
from dtrain.training.order import permute
from dtrain.training.precision import Precision
from dtrain.training.random import generators_kept
from dtrain.training.sources import Sources

T = TypeVar("T")

_LOOK_S = 2.0
"""For so long, at most, samples are compared with those of the training."""


class Validation:
    """One rank's.

    :param compare: whether samples are compared with those of the training, which is once enough.
    :param mark: called with each batch: the rank is at work.
    """

    def __init__(
        self,
        config: Config,
        precision: Precision,
        sources: Sources,
        events: Events,
        mark: Callable[[], None],
        *,
        compare: bool,
    ) -> None:
        self._config = config
        self._precision = precision
        self._sources = sources
        self._events = events
        self._mark = mark
        self._compares = compare and dist.get_rank() == 0
        self._compared: set[str] = set()

    def batches(self, name: str, dataset: Dataset, collate: Collate) -> Iterator[Any]:
        """See `Run.once`."""
        return self._marked(self._sources.once(self._sources.held_out(name, dataset, collate)))

    def _marked(self, batches: Iterator[T]) -> Iterator[T]:
        for batch in batches:
            self._mark()
            yield batch

    def measure(
        self,
        model: nn.Module,
        dataset: Dataset,
        metrics: Mapping[str, Metric] | Metric,
        name: str,
        outputs: Outputs,
        collate: Collate,
    ) -> dict[str, Any]:
        """See `Run.evaluate`."""
        data = self._sources.held_out(name, dataset, collate)
        self._check(name, dataset)
        batches = self._sources.in_turns(data)

        def computed(model: nn.Module, batch: Any) -> tuple[Any, ...]:
            with self._precision.autocast():  # not for the metrics
                return outputs(model, batch)

        found = measure(model, self._marked(batches), metrics, computed)
        values = {f"{name}/{key}": value for key, value in found.items()}
        for option, criterion in self._config.criteria().items():
            if criterion.metric.startswith(f"{name}/") and not isinstance(values.get(criterion.metric), float):
                numbers = ", ".join(key for key, value in values.items() if isinstance(value, float))
                raise UsageError(
                    f"evaluate(name={name!r}) measures {numbers}, and {option} goes by {criterion.metric!r}: measure "
                    "that too, as a number, or name one of these"
                )
        return values

    def _check(self, name: str, dataset: Dataset) -> None:
        """:raises UsageError: a model would be chosen by the data that it is trained on."""
        training = self._sources.map_style
        trained_on = any(data.samples.dataset is dataset for data in training)
        for criterion in self._config.criteria().values():
            if trained_on and criterion.metric.startswith(f"{name}/") and not criterion.on_training:
                raise UsageError(
                    f"evaluate(name={name!r}): this data set is trained on as well, and {criterion} goes by it; hold "
                    "some samples out, or say on_training=True"
                )
        if not self._compares or name in self._compared or trained_on:
            return
        self._compared.add(name)
        shared, looked = shared_samples(dataset, [data.samples.dataset for data in training])
        if shared:
            self._events.emit("shared", name=name, samples=shared, looked=looked)
            self._events.warn(
                f"{name}: {shared} of its {len(dataset)} samples are trained on as well (of {looked} of the training's "
                "that were looked at): what is measured on them says nothing about other data"
            )


def shared_samples(held_out: Dataset, training: Iterable[Dataset]) -> tuple[int, int]:
    """How many samples of a data set are trained on as well, and how many of the training's were looked at.

    Samples are compared by a hash of all that is in them. It takes two seconds at most, and looks at as many as it can
    in that time, spread evenly; so nothing may follow from it but a warning. Samples that hold what can't be compared
    safely, such as pictures of a class of their own, count as different.
    """
    begun = time.monotonic()
    with generators_kept():
        mine = {digest_of(held_out[index]) for index in _spread(len(held_out), begun + _LOOK_S / 2)} - {None}
        found, looked = set(), 0
        for dataset in training:
            for index in _spread(len(dataset), begun + _LOOK_S):
                found.add(digest_of(dataset[index]))
                looked += 1
    return len(mine & found), looked


def _spread(length: int, end: float) -> Iterator[int]:
    """All numbers below a length, in an order of which each part is spread evenly, for as long as there is time."""
    for start in range(0, length, 64):
        for number in permute(np.arange(start, min(length, start + 64)), length, key=1):
            if time.monotonic() > end:
                return
            yield int(number)
