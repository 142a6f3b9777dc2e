"""`Reader`: a DCP `StorageReader` that goes by the manifest and checks every byte before it is used.

An item is read in one `preadv`, where possible straight into the tensor that it is for; its digests are compared
before DCP is told that the tensor is there. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dtrain.checkpoint.format import BlockHasher, Chunk, Manifest, Piece, TensorItem, digest
from dtrain.checkpoint.layout import bytes_of
from dtrain.checkpoint.tree import dtype_named
from dtrain.errors import Damaged
from dtrain.storage.base import Storage


class Reader(StorageReader):
    """Reads one checkpoint.

    :param storage: the run folder.
    :param folder: the checkpoint's folder in it.
    :param manifest: its manifest, the digest of which has been checked.
    """

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._chunks = {
            (name, tuple(chunk.offsets)): (item, chunk)
            for name, item in manifest.tensors.items()
            for chunk in item.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=dtype_named(item.dtype)),
                torch.Size(item.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in item.chunks],
            )
            for name, item in self._manifest.tensors.items()
        }
        return Metadata(state_dict_metadata=dict(tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """:raises Damaged: a digest doesn't match, or a file is too short or not there."""
        for request in plan.items:
            item, chunk = self._chunk(request.storage_index)
            target = planner.resolve_tensor(request).detach()
            self._fill(target, item, chunk, request)
            planner.commit_tensor(request, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _chunk(self, index: MetadataIndex) -> tuple[TensorItem, Chunk]:
        return self._chunks[index.fqn, tuple(index.offset or ())]

    def _fill(self, target: torch.Tensor, item: TensorItem, chunk: Chunk, request: ReadItem) -> None:
        dtype = dtype_named(item.dtype)
        whole = list(request.lengths) == chunk.sizes
        if whole and target.is_cpu and target.is_contiguous() and target.dtype == dtype:
            read_piece(self._storage, self._folder, chunk, self._manifest, target)
            return
        box = torch.empty(chunk.sizes, dtype=dtype)
        read_piece(self._storage, self._folder, chunk, self._manifest, box)
        for dim, (start, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            box = box.narrow(dim, start, length)
        target.copy_(box)


def read_piece(
    storage: Storage, folder: str, piece: Piece | Chunk, manifest: Manifest, payload: torch.Tensor | None = None
) -> None:
    """Read a piece, check it against its digests, and leave a chunk's tensor bytes in `payload`.

    :raises Damaged: they don't match, or the file is too short or not there.
    """
    if payload is None or not isinstance(piece, Chunk):
        buffers = [memoryview(bytearray(piece.length))]
    else:
        body = bytes_of(payload)
        tail = piece.length - piece.payload - body.nbytes
        if tail < 0:
            raise Damaged(f"{folder}/{piece.file}: an item of {piece.length} bytes is too short for its tensor")
        buffers = [memoryview(bytearray(piece.payload)), body, memoryview(bytearray(tail))]
    with _damaged(f"{folder}/{piece.file}"):
        storage.read_into(f"{folder}/{piece.file}", piece.offset, buffers)
    hasher = BlockHasher(manifest.block_bytes)
    for buffer in buffers:
        hasher.update(buffer)
    if hasher.digests() != piece.digests:
        raise Damaged(
            f"{folder}/{piece.file}: bytes {piece.offset} to {piece.offset + piece.length} are not those "
            "that were saved"
        )


def read_manifest(storage: Storage, folder: str, name: str, expected: str) -> tuple[bytes, Manifest]:
    """The manifest and the bytes that it was read from, after a check of its digest and of all files' sizes.

    :raises Damaged: something isn't as it was saved.
    """
    with _damaged(folder):
        data = storage.read(f"{folder}/{name}")
        if digest(data) != expected:
            raise Damaged(f"{folder}/{name} is not the one that was committed")
        manifest = Manifest.from_json(data)
        for file, size in manifest.files.items():
            if (found := storage.size(f"{folder}/{file}")) != size:
                raise Damaged(f"{folder}/{file} has {found} bytes, not {size}")
    return data, manifest


@contextlib.contextmanager
def _damaged(place: str) -> Iterator[None]:
    """What can't be read because of what is in the place, not because of the way to it, counts as damaged."""
    try:
        yield
    except (EOFError, ValueError) as error:
        raise Damaged(f"{place}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO):
            raise
        raise Damaged(f"{place}: {error}") from error
