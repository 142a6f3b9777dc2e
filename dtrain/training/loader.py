"""Worker processes that load a rank's micro-batches ahead of the loop."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from dtrain.elastic.process import ENDING, die_with, held, ignore_ending

if TYPE_CHECKING:
    from dtrain.training.data import MapData, Places

_AHEAD = 2
"""Micro-batches that each worker has ready."""


class Loader:
    """PyTorch's DataLoader over the micro-batches that a rank will need, from a step on.

    :param micro_batches: this rank's of every step.
    """

    def __init__(self, data: MapData, step: int, micro_batches: range, workers: int, *, pin: bool) -> None:
        self._micro_batches = micro_batches
        self._next = step
        begin = functools.partial(_begin, os.getpid())
        loader: DataLoader[Any] = DataLoader(
            data.samples,  # type: ignore[arg-type]
            batch_sampler=_Places(data, step, micro_batches),
            collate_fn=data.samples.collate,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            pin_memory=pin,
            worker_init_fn=begin,
            multiprocessing_context="fork",  # there at once, with the data set in the memory that it inherits
            generator=torch.Generator(),  # a number is drawn from it, and the run's own are not to notice
        )
        with held():
            self._batches: Iterator[Any] = iter(loader)

    def is_at(self, step: int, micro_batches: range) -> bool:
        """Whether these come next."""
        return (step, micro_batches) == (self._next, self._micro_batches)

    def take(self, step: int) -> Iterator[Any]:
        """The batches of one step. Whoever doesn't take all of them can't go on with the next ones."""
        self._next = -1
        for _ in self._micro_batches:
            yield next(self._batches)
        self._next = step + 1

    def close(self) -> None:
        """End the workers."""
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


class _Places:
    """What a DataLoader takes for a batch sampler: it has no end."""

    def __init__(self, data: MapData, step: int, micro_batches: range) -> None:
        self._data, self._step, self._micro_batches = data, step, micro_batches

    def __iter__(self) -> Iterator[Places]:
        for step in itertools.count(self._step):
            yield from self._data.places(step, self._micro_batches)


def _begin(parent: int, worker: int) -> None:
    # torchrun sends SIGTERM, and a terminal SIGINT, to all processes; the trainer still needs its data then, for the
    # step that it is in. When the trainer is killed, the kernel kills its workers.
    ignore_ending()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *ENDING})
    die_with(parent)
