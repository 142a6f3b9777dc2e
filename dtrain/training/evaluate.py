"""Measuring a model on held-out data: the same numbers on any number of ranks, and no trace of it in the training.

Every sample is used once. What the model makes of it goes to rank 0, batch by batch, in the order of the data set, and
there into the metrics: so they need not know of other ranks, and what they add up is added in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dtrain.errors import UsageError
from dtrain.training.random import generators_kept

Outputs = Callable[[nn.Module, Any], tuple[Any, ...]]
"""What metrics are given, made of a model and a batch."""


class Metric(Protocol):
    """A torchmetrics object, or anything like it."""

    def update(self, *outputs: Any) -> object: ...

    def compute(self) -> Any: ...

    def reset(self) -> object: ...


class Mean:
    """A metric: a mean, of a loss for instance.

    :param of: called as `of(*outputs, reduction="sum")`, as in `Mean(F.cross_entropy)`, and divided by the number of
        elements of the last of the outputs. None takes outputs that are a sum, and over how many it is.
    """

    def __init__(self, of: Callable[..., torch.Tensor] | None = None) -> None:
        self._of = of
        self.reset()

    def sum(self, *outputs: Any) -> tuple[torch.Tensor, int]:
        """Of one batch: the sum, and over how many it is."""
        if self._of is not None:
            first, *rest = outputs
            outputs = (self._of(first.float(), *rest, reduction="sum"), outputs[-1].numel())
        total, count = outputs
        if int(count) != count:
            raise UsageError(f"Mean: it was given a sum over {float(count)} terms; give a whole number")
        return total, int(count)

    def update(self, *outputs: Any) -> None:
        total, count = self.sum(*outputs)
        self._total += float(total)
        self._count += count

    def compute(self) -> float:
        return self._total / self._count if self._count else float("nan")

    def reset(self) -> None:
        self._total, self._count = 0.0, 0


def pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """`(model(inputs), targets)` of a batch that is a pair of inputs and targets.

    :raises UsageError: it is something else.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise UsageError(
            f"evaluate: a batch is a {type(batch).__qualname__} and no pair of inputs and targets; say what metrics "
            "are given by outputs=lambda model, batch: (predictions, targets)"
        )
    inputs, targets = batch
    return model(inputs), targets


def measure(
    model: nn.Module,
    batches: Iterator[tuple[Any, bool]],
    metrics: Mapping[str, Metric] | Metric,
    outputs: Outputs,
) -> dict[str, Any]:
    """What the metrics come to. All ranks must reach it.

    :param batches: this rank's, each with whether it counts, and as many on each rank. Those of all ranks that count,
        taken in turn, are the data set in its order.
    :returns: on all ranks: a number, or a tensor that isn't one, by name.
    """
    known = metrics if isinstance(metrics, Mapping) else {"": metrics}
    for metric in known.values():
        _alone(metric)
        metric.reset()
    with _evaluating(model):
        for made in _in_order(_made(outputs, model, batches)):
            for name, metric in known.items():
                try:
                    metric.update(*made)
                except (TypeError, ValueError, RuntimeError) as error:
                    error.add_note(f"evaluate: metric {name or type(metric).__qualname__!r}, given {_told(made)}")
                    raise
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found[0] = {
            part: _plain(value) for name, metric in known.items() for part, value in _named(name, metric.compute())
        }
    dist.broadcast_object_list(found, src=0)
    for metric in known.values():
        metric.reset()
    values: dict[str, Any] = found[0]
    return values


def _made(outputs: Outputs, model: nn.Module, batches: Iterator[tuple[Any, bool]]) -> Iterator[tuple[Any, ...] | None]:
    """What becomes of each batch; None of one that doesn't count."""
    for batch, counts in batches:
        made = outputs(model, batch)
        if not isinstance(made, tuple):
            raise UsageError(
                f"evaluate: outputs gave a {type(made).__qualname__}; it gives a tuple, such as (predictions, targets)"
            )
        plain = tuple(part.detach().cpu() if isinstance(part, torch.Tensor) else part for part in made)
        yield plain if counts else None


def _in_order(mine: Iterator[tuple[Any, ...] | None]) -> Iterator[tuple[Any, ...]]:
    """On rank 0, what all ranks have made, in the order of the data set; on the others, nothing."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for made in mine:
        together: list[Any] = [made]
        if world_size > 1:
            together = [None] * world_size
            dist.gather_object(made, together if rank == 0 else None, dst=0)
        yield from (one for one in together if one is not None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Each module is afterwards in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), generators_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _alone(thing: object, seen: set[int] | None = None) -> None:
    """Keep torchmetrics, wherever in it, from adding up over the ranks what rank 0 has the whole of."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, list | tuple | dict):
        for part in thing.values() if isinstance(thing, dict) else thing:
            _alone(part, seen)
    elif callable(getattr(thing, "update", None)) and callable(getattr(thing, "compute", None)):
        if hasattr(thing, "distributed_available_fn"):
            thing.__dict__["distributed_available_fn"] = _never
        for part in getattr(thing, "__dict__", {}).values():
            _alone(part, seen)


def _never() -> bool:
    return False


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(f"{name}/{key}" if name else str(key), part)
    else:
        yield name or "metric", value


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else value.detach().cpu()
    if isinstance(value, np.generic | np.ndarray) and value.size == 1:
        return float(value.item())
    return float(value) if isinstance(value, int | float) else value


def _told(made: tuple[Any, ...]) -> str:
    return ", ".join(
        f"{part.dtype} of shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__qualname__
        for part in made
    )
