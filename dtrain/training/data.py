"""Which samples a step is made of, and how they get there.

The samples of all epochs are one endless sequence: epoch after epoch, each in an order of its own. Step `s` uses the
positions from `(s - 1) * global_batch` on, so a batch may reach into the next epoch, every sample is used once an
epoch, and the number of samples consumed is all that a checkpoint has to remember.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.utils.data import default_collate

from dtrain.config import Config
from dtrain.errors import DataError
from dtrain.training.random import derive, set_generators

Ids = npt.NDArray[np.int64]


class Dataset(Protocol):
    """A map-style data set. With `__getitems__(ids)` it gives a whole micro-batch at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Data:
    """A data set in the order in which a run uses it.

    :param name: for messages.
    :param collate: makes a batch of a list of samples.
    :param shuffle: False keeps the data set's own order in every epoch.
    :raises DataError: the data set is empty, or smaller than a global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        device: torch.device,
        name: str = "data",
        collate: Callable[[list[Any]], Any] = default_collate,
        shuffle: bool = True,
    ) -> None:
        if not callable(getattr(dataset, "__len__", None)) or not callable(getattr(dataset, "__getitem__", None)):
            raise DataError(
                f"{name}: a {type(dataset).__qualname__} has no __len__ and __getitem__; dtrain needs a map-style "
                "data set, since the order of the samples must not depend on the number of ranks"
            )
        self.name = name
        self._dataset = dataset
        self._length = len(dataset)
        self._config = config
        self._device = device
        self._collate = collate
        self._shuffle = shuffle
        if self._length == 0:
            raise DataError(f"{name}: the data set is empty; check the path or the filter that made it")
        if self._length < config.global_batch:
            raise DataError(
                f"{name}: the data set has {self._length} samples, less than one step's "
                f"global_batch={config.global_batch}; add data or make global_batch smaller"
            )

    def epoch_after(self, step: int) -> int:
        """Whole epochs that have been used after so many steps."""
        return step * self._config.global_batch // self._length

    def ids(self, step: int, micro_batches: range) -> Ids:
        """The samples of some of a step's micro-batches, a row for each. Steps count from 1, micro-batches from 0."""
        config = self._config
        first = (step - 1) * config.global_batch
        positions = np.arange(
            first + micro_batches.start * config.micro_batch, first + micro_batches.stop * config.micro_batch
        )
        ids = positions % self._length
        if self._shuffle:
            epochs = positions // self._length
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                here = epochs == epoch
                ids[here] = permute(ids[here], self._length, derive(config.seed, "order", epoch))
        return ids.reshape(len(micro_batches), config.micro_batch)

    def load(self, ids: Ids) -> Any:
        """The batch of these samples, on the run's device."""
        batched = getattr(self._dataset, "__getitems__", None)
        samples = batched(ids.tolist()) if batched else [self._dataset[index] for index in ids.tolist()]
        return _to(self._collate(samples), self._device)

    def fingerprint(self) -> str:
        """Tells this data set from another: its length, and what its first, middle and last sample hold.

        A data set can define `fingerprint()` itself, if it knows a better way.
        """
        own = getattr(self._dataset, "fingerprint", None)
        if callable(own):
            return f"{self._length}-{own()}"
        state = xxhash.xxh3_64()
        for index in sorted({0, self._length // 2, self._length - 1}):
            set_generators("fingerprint", index)  # an augmentation shows the same face each time
            _hash_sample(state, self._dataset[index])
        return f"{self._length}-{state.hexdigest()}"


def block(length: int, rank: int, world_size: int) -> range:
    """The part of a list that falls to a rank: contiguous, and of equal length but for one."""
    return range(rank * length // world_size, (rank + 1) * length // world_size)


def permute(positions: Ids, length: int, key: int, rounds: int = 8) -> Ids:
    """Where a permutation of `range(length)` takes each of `positions`, without a table of it.

    A balanced Feistel network permutes the next larger power of four; what falls outside the range is sent through
    again until it is inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Its
    round function is multiplicative hashing: the highest bits of a product (Knuth, TAOCP volume 3, 6.4).

    :param key: another one gives another permutation.
    """
    half = max(3, ((length - 1).bit_length() + 1) // 2)
    shift, high, mask = np.uint64(half), np.uint64(64 - half), np.uint64((1 << half) - 1)
    keys = _round_keys(key, rounds)
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for addend, factor in keys:
            left, right = right, left ^ (((right + addend) * factor) >> high)
        out[outside] = (left << shift) | right
        outside = out >= length
    return out.astype(np.int64)


@functools.lru_cache
def _round_keys(key: int, rounds: int) -> list[tuple[np.uint64, np.uint64]]:
    return [
        (np.uint64(derive(key, "addend", number)), np.uint64(2 * derive(key, "factor", number) + 1))
        for number in range(rounds)
    ]


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if device.type == "cpu":
        return batch
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [_to(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _hash_sample(state: xxhash.xxh3_64, sample: Any) -> None:
    if isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if sample.numel() else b""
    if isinstance(sample, np.ndarray) and sample.dtype.hasobject:
        sample = sample.tolist()
    if isinstance(sample, np.ndarray | np.generic):
        state.update(np.ascontiguousarray(sample).tobytes())
    elif isinstance(sample, Mapping):
        for key in sample:
            state.update(str(key).encode())
            _hash_sample(state, sample[key])
    elif isinstance(sample, Sequence) and not isinstance(sample, str | bytes):
        for value in sample:
            _hash_sample(state, value)
    elif isinstance(sample, str | bytes | int | float | bool | None):
        state.update(repr(sample).encode())
    else:
        state.update(type(sample).__qualname__.encode())  # a picture, say: its type is all that can be compared safely
