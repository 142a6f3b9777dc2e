"""`Writer`: a DCP `StorageWriter` that hashes what it writes and leaves a manifest.

The files are those that stock DCP writes, so stock `dcp.load` opens the folder. Every rank writes one shard file; the
coordinator writes the index when all of them are durable. Nothing becomes a checkpoint here: that is the commit log's
part (see `manager`).
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dtrain.checkpoint.format import (
    MANIFEST,
    METADATA,
    BlockHasher,
    Chunk,
    Manifest,
    Piece,
    TensorItem,
    digest,
    dtype_name,
    encode,
    flatten,
)
from dtrain.storage.base import Sink, Storage


@dataclass(frozen=True)
class Written:
    """What is reported back of a finished checkpoint."""

    manifest: str
    """Digest of the manifest."""
    size: int
    """Of all shard files together, in bytes."""


class Writer(StorageWriter):
    """Writes one attempt.

    :param storage: the run folder.
    :param folder: the attempt's folder in it, which nothing was written to before.
    :param tree: the state that is saved, the same on all ranks but for the tensors' shards.
    :param step: how many optimizer steps the state is the outcome of.
    """

    def __init__(self, storage: Storage, folder: str, tree: Any, *, step: int) -> None:
        self._storage = storage
        self._folder = folder
        self._leaves = flatten(tree)
        self._tree = encode(tree)
        self._step = step
        self._rank = 0
        self.written: Written | None = None
        """Set on the coordinator when the attempt is whole."""

    @property
    def state_dict(self) -> dict[str, Any]:
        """What to give to `dcp.save`, with a planner that leaves it flat."""
        return {name: leaf for name, (_, leaf) in self._leaves.items()}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"__{self._rank}_0.distcp"
        results: list[WriteResult] = []
        if plan.items:
            with self._storage.open_new(f"{self._folder}/{name}") as sink:
                offset = 0
                for item in plan.items:
                    piece = _write_item(sink, name, offset, item, planner)
                    offset += piece.length
                    results.append(WriteResult(item.index, piece.length, piece))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pieces = {result.index: result.storage_data for rank in results for result in rank}
        files: dict[str, int] = {}
        for piece in pieces.values():
            files[piece.file] = max(files.get(piece.file, 0), piece.offset + piece.length)
        index = pickle.dumps(
            replace(
                metadata,
                planner_data={name: path for name, (path, _) in self._leaves.items()},
                storage_data={
                    key: _StorageInfo(piece.file, piece.offset, piece.length) for key, piece in pieces.items()
                },
            )
        )
        tensors: dict[str, TensorItem] = {}
        values: dict[str, Piece] = {}
        for key, piece in pieces.items():
            meta = metadata.state_dict_metadata[key.fqn]
            if isinstance(meta, TensorStorageMetadata):
                empty = TensorItem(dtype=dtype_name(meta.properties.dtype), shape=list(meta.size), chunks=[])
                tensors.setdefault(key.fqn, empty).chunks.append(piece)
            else:
                values[key.fqn] = piece
        manifest = Manifest(
            step=self._step,
            world_size=len(results),
            tree=self._tree,
            tensors=tensors,
            values=values,
            files=files | {METADATA: len(index)},
            metadata=digest(index),
        ).to_json()
        for name, data in ((METADATA, index), (MANIFEST, manifest)):
            with self._storage.open_new(f"{self._folder}/{name}") as sink:
                sink.write(data)
        self._storage.seal(self._folder)
        self.written = Written(digest(manifest), sum(files.values()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _write_item(sink: Sink, file: str, offset: int, item: WriteItem, planner: SavePlanner) -> Piece:
    data = planner.resolve_data(item)
    hasher = BlockHasher()
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO)
        view = data.getbuffer()
        sink.write(view)
        hasher.update(view)
        return Piece(file=file, offset=offset, length=view.nbytes, digests=hasher.digests())
    assert isinstance(data, torch.Tensor)
    assert item.tensor_data is not None
    frame = _frame(data)
    sink.write(frame)
    hasher.update(frame)
    return Chunk(
        file=file,
        offset=offset,
        length=frame.nbytes,
        digests=hasher.digests(),
        payload=_payload(frame),
        offsets=list(item.tensor_data.chunk.offsets),
        sizes=list(item.tensor_data.chunk.sizes),
    )


def _frame(tensor: torch.Tensor) -> memoryview:
    """What `torch.save` makes of a tensor: a zip file in which the tensor's bytes lie as they are."""
    # A conjugate or negative view says so beside its bytes, where only an unpickler would look.
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()  # torch.save writes the whole storage, of which a view is only a part
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getbuffer()


def _payload(frame: memoryview) -> int:
    """Where the tensor's own bytes begin in its frame."""
    with zipfile.ZipFile(io.BytesIO(frame)) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    # The local header, which the zip directory points to: 30 bytes, of which the last four are the lengths of the
    # name and of the padding that follow (APPNOTE.TXT 4.3.7).
    start = record.header_offset
    lengths = bytes(frame[start + 26 : start + 30])
    return start + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
