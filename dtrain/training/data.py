"""Which samples a step is made of, and how they get there.

Step `s` uses the positions from `(s - 1) * global_batch` on of the endless sequence of all epochs (see `order`), so a
batch may reach into the next epoch, every sample is used once an epoch, and the number of samples consumed is all that
a checkpoint has to remember.

The random numbers that a sample is made with, by an augmentation for instance, follow from its position in that
sequence: they are the same in whichever process it is loaded, and next to whichever others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset

from dtrain.config import Config
from dtrain.errors import DataError
from dtrain.training.loader import Loader
from dtrain.training.order import Ids, Order
from dtrain.training.random import set_generators

Collate = Callable[[list[Any]], Any]
"""Makes a batch of a list of samples."""

Places = list[tuple[int, int]]
"""Of the samples of a batch: position in the sequence, and number in the data set."""


class Dataset(Protocol):
    """A map-style data set. With `__getitems__(ids)` it gives a whole micro-batch at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Data(Protocol):
    """Where the micro-batches of a rank come from."""

    name: str

    def batches(self, step: int, micro_batches: range) -> Iterator[Any]:
        """Some of a step's, in order, on the run's device. Steps count from 1, micro-batches from 0."""

    def epoch_after(self, step: int) -> int:
        """Whole epochs that have been used after so many steps."""

    def position(self) -> Any:
        """What a checkpoint keeps of it. All ranks must reach it."""

    def restore(self, saved: Any) -> None:
        """:raises DataError: it can't go on from there."""

    def close(self) -> None:
        """End what works for it in the background."""


class MapData:
    """A map-style data set in the order in which a run uses it.

    :param name: for messages.
    :param shuffle: False keeps the data set's own order in every epoch.
    :param workers: processes that load samples ahead; 0 loads them in the loop.
    :raises DataError: the data set is empty, or smaller than a global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        device: torch.device,
        name: str,
        collate: Collate,
        *,
        shuffle: bool = True,
        workers: int = 0,
        for_training: bool = True,
    ) -> None:
        self.name = name
        self.samples = Samples(dataset, collate, config.seed)
        self._config = config
        self._device = device
        self._workers = workers
        self._loader: Loader | None = None
        length = len(dataset)
        self.order = Order(length, config.seed, shuffle)
        if length == 0:
            raise DataError(f"{name}: the data set is empty; check the path or the filter that made it")
        if for_training and length < config.global_batch:
            raise DataError(
                f"{name}: the data set has {length} samples, less than one step's "
                f"global_batch={config.global_batch}; add data or make global_batch smaller"
            )

    def epoch_after(self, step: int) -> int:
        return step * self._config.global_batch // self.order.length

    def batches(self, step: int, micro_batches: range) -> Iterator[Any]:
        if self._workers:
            if self._loader is None or not self._loader.is_at(step, micro_batches):
                self.close()
                self._loader = Loader(self, step, micro_batches, self._workers, pin=self._device.type == "cuda")
            batches: Iterator[Any] = self._loader.take(step)
        else:
            batches = map(self.samples.batch, self.places(step, micro_batches))
        for batch in batches:
            yield to_device(batch, self._device)

    def places(self, step: int, micro_batches: range) -> Iterator[Places]:
        first, end = self._positions(step, micro_batches)
        rows = np.stack((np.arange(first, end), self.order.ids(first, end)), axis=1)
        for row in rows.reshape(-1, self._config.micro_batch, 2):
            yield list(map(tuple, row.tolist()))

    def _positions(self, step: int, micro_batches: range) -> tuple[int, int]:
        first, size = (step - 1) * self._config.global_batch, self._config.micro_batch
        return first + micro_batches.start * size, first + micro_batches.stop * size

    def once(self, rank: int, world_size: int) -> list[Ids]:
        """All samples once, in their own order, dealt out to the ranks batch by batch: this rank's.

        They are of `micro_batch` samples, or of less if there would be ranks without any.

        :raises DataError: there are less samples than ranks.
        """
        length, size = self.order.length, self._once_size(world_size)
        mine = range(rank, self.batches_once(world_size), world_size)
        return [np.arange(number * size, min(length, (number + 1) * size)) for number in mine]

    def batches_once(self, world_size: int) -> int:
        """How many batches all ranks together get by it."""
        return -(-self.order.length // self._once_size(world_size))

    def _once_size(self, world_size: int) -> int:
        if self.order.length < world_size:
            raise DataError(
                f"{self.name}: {self.order.length} samples can't be shared out over {world_size} ranks; add some"
            )
        return min(self._config.micro_batch, self.order.length // world_size)

    def load_once(self, ids: Ids) -> Any:
        """A batch of `once`."""
        return to_device(self.samples.batch([(~index, index) for index in ids.tolist()]), self._device)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.samples.fingerprint(self.name)

    def position(self) -> str:
        """Tells this data set from another: its length, and what its first, middle and last sample hold.

        A data set can define `fingerprint()` itself, if it knows a better way.
        """
        return self._fingerprint

    def restore(self, saved: Any) -> None:
        now = self.position()
        if saved != now:
            raise DataError(
                f"{self.name}: the data set is not the one that the checkpoint was made with (fingerprint "
                f"{saved}, now {now}; it begins with the number of samples). Bring the data back, or "
                "start in another run folder"
            )

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None


class Samples:
    """Loads batches, here or in a worker process."""

    def __init__(self, dataset: Dataset, collate: Collate, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate
        self._seed = seed

    def batch(self, places: Places) -> Any:
        """Of these samples, in the memory of the host."""
        return self.collate(self.__getitems__(places))

    def __getitems__(self, places: Places) -> list[Any]:
        batched = getattr(self.dataset, "__getitems__", None)
        if batched is not None:
            set_generators(self._seed, "sample", places[0][0])
            found: list[Any] = batched([index for _, index in places])
            return found
        return [self._one(position, index) for position, index in places]

    def _one(self, position: int, index: int) -> Any:
        set_generators(self._seed, "sample", position)
        return self.dataset[index]

    def fingerprint(self, name: str) -> str:
        """:raises DataError: a sample isn't the same each time."""
        own, length = getattr(self.dataset, "fingerprint", None), len(self.dataset)
        if callable(own):
            return f"{length}-{own()}"
        if self._hash([0]) != self._hash([0]):
            raise DataError(
                f"{name}: sample 0 is another one each time that it is loaded: the data set draws from a generator of "
                "its own, which begins anew after a failure; draw from torch's, numpy's or Python's global one, or "
                "define fingerprint()"
            )
        return f"{length}-{self._hash(sorted({0, length // 2, length - 1}))}"

    def _hash(self, indexes: list[int]) -> str:
        state = xxhash.xxh3_64()
        for index in indexes:
            set_generators("fingerprint", index)  # an augmentation shows the same face each time
            _hash_sample(state, self.dataset[index])
        return state.hexdigest()


def is_map_style(dataset: object) -> TypeGuard[Dataset]:
    """Whether samples can be asked for by number."""
    if isinstance(dataset, IterableDataset):  # has a __getitem__ that only raises
        return False
    return callable(getattr(dataset, "__len__", None)) and callable(getattr(dataset, "__getitem__", None))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if device.type == "cpu":
        return batch
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def digest_of(sample: Any) -> int | None:
    """A hash of all that is in a sample; None if a part of it is of a kind that can't be compared safely."""
    state = xxhash.xxh3_64()
    return state.intdigest() if _hash_sample(state, sample) else None


def _hash_sample(state: xxhash.xxh3_64, sample: Any) -> bool:
    """:returns: whether that was all of it."""
    if isinstance(sample, torch.Tensor) and sample.layout == torch.strided and not sample.is_nested:
        plain = sample.detach().cpu().resolve_conj().resolve_neg().contiguous()
        sample = plain.view(-1).view(torch.uint8).numpy() if plain.numel() else b""
    if isinstance(sample, np.ndarray) and sample.dtype.hasobject:
        sample = sample.tolist()
    if isinstance(sample, np.ndarray | np.generic):
        state.update(np.ascontiguousarray(sample).tobytes())
    elif isinstance(sample, Mapping):
        whole = True
        for key in sample:
            state.update(str(key).encode())
            whole &= _hash_sample(state, sample[key])
        return whole
    elif isinstance(sample, Sequence) and not isinstance(sample, str | bytes):
        parts = [_hash_sample(state, value) for value in sample]  # all of them, whatever the first is
        return all(parts)
    elif isinstance(sample, str | bytes | int | float | bool | None):
        state.update(repr(sample).encode())
    else:
        state.update(type(sample).__qualname__.encode())  # a picture, say, or a sparse tensor
        return False
    return True
