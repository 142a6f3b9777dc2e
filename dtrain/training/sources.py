"""The data sets of a run: made, gone through, and brought back to where they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dtrain.checkpoint.manager import from_all_ranks
from dtrain.config import Config
from dtrain.errors import DataError, UsageError
from dtrain.training.data import Collate, Data, Dataset, MapData, is_map_style
from dtrain.training.order import block
from dtrain.training.parallel import Parallel
from dtrain.training.random import generators_kept
from dtrain.training.stream import Stream


class Sources:
    """By name, in the order in which a run uses them."""

    def __init__(self, config: Config, device: torch.device, parallel: Parallel) -> None:
        self._config = config
        self._device = device
        self._parallel = parallel
        self._known: dict[str, Data] = {}

    def add(
        self, name: str, dataset: Dataset | Iterable[Any], collate: Collate, *, shuffle: bool, workers: int
    ) -> Data:
        """See `Run.data`."""
        if name in self._known:
            raise UsageError(f"data(name={name!r}) was called before; give each data set a name of its own")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise UsageError(f"data(workers={workers!r}) must be a number of processes, 0 or more")
        if is_map_style(dataset):
            data: Data = MapData(dataset, self._config, self._device, name, collate, shuffle=shuffle, workers=workers)
        elif self._config.tensor_parallel > 1:
            raise UsageError(
                f"data({name!r}) with tensor_parallel={self._config.tensor_parallel}: ranks that compute a micro-batch "
                "together need the same samples, and of an iterable data set each has its own; take a map-style one"
            )
        elif workers:
            raise UsageError(
                f"data(workers={workers}): an iterable data set loads by itself; give it workers of its own"
            )
        else:
            data = Stream(dataset, self._config, self._device, name, collate)
        self._known[name] = data
        return data

    def held_out(self, name: str, dataset: Dataset, collate: Collate) -> MapData:
        """A data set that isn't trained on.

        :raises DataError: it has no length, or no samples by number.
        """
        if not is_map_style(dataset):
            raise DataError(
                f"{name}: a {type(dataset).__qualname__} is no map-style data set (with __len__ and __getitem__); give "
                "the data set itself, and not a loader of it"
            )
        return MapData(dataset, self._config, self._device, name, collate, for_training=False)

    def once(self, data: MapData) -> Iterator[Any]:
        """See `Run.once`."""
        ranks, models = self._parallel.world_size, self._parallel.models
        mine, together = data.once(self._parallel.rank, ranks), data.batches_once(ranks)
        spare = -(-together // ranks) - len(mine)
        for number, ids in enumerate(mine):
            with generators_kept():
                batch = data.load_once(ids)
            for model in models:
                model.look(0 if number else spare, uneven=together % ranks > 0)
            yield batch
        for model in models:
            model.look(0, uneven=False)

    def in_turns(self, data: MapData) -> Iterator[tuple[Any, bool]]:
        """The batches of `once`, as many for each rank: who would have one less has its last one twice.

        Each comes with whether it counts; on all ranks but one of those that compute a batch together, none does.
        """
        ranks, models = self._parallel.world_size, self._parallel.models
        mine, together = data.once(self._parallel.rank, ranks), data.batches_once(ranks)
        for turn in range(-(-together // ranks)):
            with generators_kept():
                batch = data.load_once(mine[min(turn, len(mine) - 1)])
            for model in models:
                model.look(0, uneven=False)
            yield batch, self._parallel.counts and turn < len(mine)

    def skip(self, step: int) -> None:
        """Leave out a step."""
        mine = block(self._config.micro_batches, self._parallel.rank, self._parallel.world_size)
        for _, data in self._sorted():
            if not isinstance(data, MapData):
                for _ in data.batches(step, mine):
                    pass

    def ids(self, step: int, micro_batches: range | None = None) -> dict[str, list[int]]:
        """The samples of a step, as far as they have ids. :param micro_batches: of these; None is of all of them."""
        chosen = range(self._config.micro_batches) if micro_batches is None else micro_batches
        return {
            name: [index for places in data.places(step, chosen) for _, index in places]
            for name, data in self._sorted()
            if isinstance(data, MapData)
        }

    @property
    def map_style(self) -> list[MapData]:
        """Those that are trained on by number."""
        return [data for _, data in self._sorted() if isinstance(data, MapData)]

    @property
    def can_rewind(self) -> bool:
        """Whether a step's samples can be had again."""
        return len(self.map_style) == len(self._known)

    def check(self) -> None:
        """All ranks must reach it. :raises DataError: they don't have the same data."""
        known = {name: data.position() for name, data in self._sorted() if not isinstance(data, Stream)}
        everybodys = from_all_ranks(known)
        for rank, other in enumerate(everybodys):
            if other != everybodys[0]:
                raise DataError(f"the data of rank {rank} is not that of rank 0; make or read it alike on all ranks")

    def positions(self) -> dict[str, Any]:
        """What a checkpoint keeps of them. All ranks must reach it."""
        return {name: data.position() for name, data in self._sorted()}

    def restore(self, saved: dict[str, Any]) -> None:
        """:raises DataError: one of them can't go on from there, or begins anew in another's stead."""
        gone = [name for name, position in saved.items() if name not in self._known and isinstance(position, list)]
        new = [name for name, data in self._sorted() if name not in saved and isinstance(data, Stream)]
        if gone and new:  # a map-style one has its place by the step's number, whatever it is called
            raise DataError(
                f"the checkpoint knows where {gone[0]!r} was, and this run has {new[0]!r} in its stead, an iterable "
                "data set that would begin anew: give it the name that it had; or, if it is another one, call run.data "
                "for both, or start in another run folder"
            )
        for name, position in saved.items():
            if name in self._known:
                self._known[name].restore(position)

    def epoch_after(self, step: int) -> int:
        """Whole epochs after so many steps, of the one that has come furthest."""
        return max((data.epoch_after(step) for data in self._known.values()), default=0)

    def close(self) -> None:
        """End what loads ahead."""
        for data in self._known.values():
            data.close()

    def _sorted(self) -> list[tuple[str, Data]]:
        return sorted(self._known.items())
