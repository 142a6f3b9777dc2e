"""`Writer`: a DCP `StorageWriter` that hashes what it writes and leaves a manifest.

    writer = Writer("saved", "step-7", state, step=7)
    dcp.save(writer.state_dict, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))

The files are those that stock DCP writes, so stock `dcp.load` opens the folder. Every rank writes one shard file; the
coordinator writes the index when all of them are durable. Nothing becomes a checkpoint here: that is the commit log's
part (see `catalog`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dtrain.checkpoint.format import BlockHasher, Part, json_text, tensors_to_json
from dtrain.checkpoint.index import Indexes
from dtrain.checkpoint.layout import Layout
from dtrain.checkpoint.tree import dtype_name, encode, flatten, leaves_of
from dtrain.errors import StateError, UsageError
from dtrain.storage.base import Sink, Storage
from dtrain.storage.places import storage_at


class Writer(StorageWriter):
    """Writes one checkpoint, in any loop; what it wrote is in no run's log. See this module's beginning for its use.

    :param storage: a folder, or the storage that stands for it.
    :param folder: the checkpoint's folder in it, which nothing was written to before.
    :param tree: the state that is saved, the same on all ranks but for the tensors' shards.
    :param step: how many optimizer steps the state is the outcome of.
    :raises UsageError: the step is no number of steps.
    :raises StateError: the tree holds what can't be saved.
    """

    def __init__(self, storage: Storage | str | os.PathLike[str], folder: str, tree: Any, *, step: int) -> None:
        if type(step) is not int or step < 0:
            raise UsageError(f"Writer(step={step!r}): give the number of optimizer steps, a whole one from 0 on")
        self._storage = storage_at(storage) if isinstance(storage, str | os.PathLike) else storage
        self._folder = folder
        self._leaves = flatten(tree)
        self._tree = encode(tree)
        self._step = step
        self._rank = 0
        self.manifest = ""
        """Digest of the manifest, set on the coordinator when the attempt is whole."""
        self.size = 0
        """Of all shard files together, in bytes; set likewise."""

    @property
    def state_dict(self) -> dict[str, Any]:
        """What to give to `dcp.save`, with a planner that leaves it flat."""
        return {name: leaf for name, (_, leaf) in self._leaves.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0)
        if shard_name(self._rank) in self._storage.files(self._folder):
            raise UsageError(f"{self._storage.root}/{self._folder} is there already; give another name")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            layout = Layout(item for item in plan.items if item.type != WriteItemType.BYTE_IO)
            data = {item.index: planner.resolve_data(item) for item in plan.items}
            tensors = [tensor for index in layout.indices if isinstance(tensor := data[index], torch.Tensor)]
            copies = {index.fqn: copy.getvalue() for index, copy in data.items() if isinstance(copy, io.BytesIO)}
            name = shard_name(self._rank)
            with self._storage.open_new(f"{self._folder}/{name}", layout.size) as sink:
                digests = write_stream(sink, layout, layout.stream(tensors))
                part = with_values(
                    Part(file=name, size=layout.size, items=layout.items, digests=digests),
                    copies,
                    sink,
                )
            results.append(WriteResult(plan.items[0].index, part.size, part))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """:raises StateError: what was planned isn't what the tree tells of."""
        shapes = {
            name: (dtype_name(item.properties.dtype), item.size)
            for name, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        tensors = [name for name, (_, leaf) in self._leaves.items() if isinstance(leaf, torch.Tensor)]
        if missing := [name for name in tensors if name not in shapes]:
            raise StateError(
                f"{self._folder}: dcp.save was given no tensor {missing[0]}, which the Writer was made with; give it "
                "writer.state_dict, with a planner that leaves it flat, and the Writer a new folder"
            )
        parts: list[Part] = [result.storage_data for rank in results for result in rank]
        self.size = sum(part.size for part in parts)
        self.manifest = Indexes().write(
            self._storage,
            self._folder,
            parts,
            step=self._step,
            world_size=len(results),
            tree=json_text(self._tree),
            tensors=[tensors_to_json(shapes)],
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def shard_name(rank: int) -> str:
    return f"__{rank}_0.distcp"


def write_stream(sink: Sink, layout: Layout, stream: Iterable[memoryview]) -> bytes:
    """Write a shard file as it streams by. :returns: its items' digests."""
    # Three parts to an item: what stands before it, with its frame; its tensor's bytes; the end of its frame.
    parts = iter(stream)
    digests = []
    for place in layout.places:
        head, body, tail = next(parts), next(parts), next(parts)
        hasher = BlockHasher()
        for data in (head[head.nbytes - len(place.frame.head) :], body, tail):
            hasher.update(data)
        digests.append(hasher.digests())
        for data in (head, body, tail):
            sink.write(data)
    for data in parts:
        sink.write(data)
    return b"".join(digests)


def pickled(tree: str) -> dict[str, bytes]:
    """Copies of the plain values, for stock DCP: each padded to a length that changes as rarely as possible.

    :param tree: JSON text of the state.
    """
    copies = {}
    for name, (_, leaf) in leaves_of(json.loads(tree)).items():
        if not isinstance(leaf, torch.Tensor):
            stream = io.BytesIO()
            # The older form is one pickle after the other, which may have bytes behind it that nobody reads.
            torch.save(leaf, stream, _use_new_zipfile_serialization=False)
            data = stream.getvalue()
            copies[name] = data + bytes(-(len(data) + 32) % 64 + 32)
    return copies


def with_values(part: Part, copies: dict[str, bytes], sink: Sink) -> Part:
    """Append the pickled copies of plain values to a shard file, and tell of them in its part of the manifest."""
    items, digests, size = [], [part.digests], part.size
    for name, copy in copies.items():
        sink.write(copy)
        items.append([name, size, len(copy)])
        hasher = BlockHasher()
        hasher.update(memoryview(copy))
        digests.append(hasher.digests())
        size += len(copy)
    more = json_text(items)[1:-1]
    text = part.items if not more else f"{part.items[:-1]}{',' if len(part.items) > 2 else ''}{more}]"
    return Part(file=part.file, size=size, items=text, digests=b"".join(digests))
