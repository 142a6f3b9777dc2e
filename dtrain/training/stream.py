"""Samples of an iterable data set: each rank has its own, which knows where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dtrain.config import Config
from dtrain.errors import DataError
from dtrain.training.data import Collate, to_device
from dtrain.training.random import generators_kept, set_generators


class Stream:
    """An iterable data set with `state_dict` and `load_state_dict`, such as torchdata's StatefulDataLoader.

    What a rank gets is for the data set to decide, by the rank and the number of ranks. So a run can go on only with as
    many ranks as its checkpoint had.

    :raises DataError: it has no state that could be saved.
    """

    def __init__(self, dataset: Any, config: Config, device: torch.device, name: str, collate: Collate) -> None:
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(dataset, method, None)):
                raise DataError(
                    f"{name}: a {type(dataset).__qualname__} is no map-style data set (with __len__ and __getitem__), "
                    f"and as an iterable one it has no {method}: give it one, or a run could not go on where it was"
                )
        self.name = name
        self._dataset = dataset
        self._config = config
        self._device = device
        self._collate = collate
        self._iterator: Iterator[Any] | None = None

    def batches(self, step: int, micro_batches: range) -> Iterator[Any]:
        for number in micro_batches:
            set_generators(self._config.seed, self.name, step, number)
            samples = [self._one() for _ in range(self._config.micro_batch)]
            yield to_device(self._collate(samples), self._device)

    def _one(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                with generators_kept():  # it comes at other steps after a restart
                    self._iterator = iter(self._dataset)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None  # the next epoch
        raise DataError(f"{self.name}: the data set is empty on rank {dist.get_rank()}")

    def epoch_after(self, step: int) -> int:
        return 0

    def position(self) -> list[Any]:
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self._dataset.state_dict())
        return states

    def restore(self, saved: Any) -> None:
        ranks = dist.get_world_size()
        if not isinstance(saved, list) or len(saved) != ranks:
            before = f"{len(saved)} ranks" if isinstance(saved, list) else "a map-style data set"
            raise DataError(
                f"{self.name}: an iterable data set goes on only with as many ranks as before; saved with {before}, "
                f"now {ranks}. Start as many, or use a map-style data set"
            )
        self._dataset.load_state_dict(saved[dist.get_rank()])

    def close(self) -> None:
        self._iterator = None
