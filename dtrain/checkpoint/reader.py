"""Loading a checkpoint by its manifest: a rank reads the parts that it needs, and checks every byte before it is used.

    load_tensors(storage, folder, manifest, {"model.weight": tensor, ...})

Each rank works out for itself what it needs, for plain tensors and DTensors alike, however the checkpoint was cut.
Nothing is unpickled. `Reader` does the same for `dcp.load` in anybody's loop:

    dcp.load(state, storage_reader=Reader.open("runs/x"))
"""

from __future__ import annotations

import io
import os
from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dtrain.checkpoint.blocks import Want, damaged_by, read_blocks
from dtrain.checkpoint.format import Chunk, Manifest, TensorItem, digest
from dtrain.checkpoint.layout import bytes_of, plain
from dtrain.checkpoint.machine import no_collection
from dtrain.checkpoint.tree import dtype_named, leaves_of
from dtrain.checkpoint.wants import check_type, tied, untied, wants_of, without_tied
from dtrain.errors import Damaged
from dtrain.storage.base import Readable, Storage, inside, looks


@no_collection()
def load_tensors(
    storage: Readable,
    folder: str,
    manifest: Manifest,
    targets: Mapping[str, torch.Tensor],
    *,
    cast: Container[str] = (),
    threads: int | None = None,
) -> int:
    """Read tensors of a checkpoint into memory. Each rank does so for itself, and for its own part of a DTensor.

    :param folder: the checkpoint's, in the storage.
    :param targets: the tensors to fill, by their names in the manifest.
    :param cast: names of those whose type may differ from the saved one.
    :param threads: how many read at once; as many as there are processors for, if not given.
    :returns: how many bytes were read.
    :raises Damaged: a byte isn't what was saved; the targets' contents are worth nothing then.
    :raises StateError: a target has another shape or type than what was saved, nothing was saved by its name, or it
        is tied to another one of which something else was saved; nothing has been read then.
    """
    return read_blocks(storage, folder, wants_of(folder, manifest, targets, cast), manifest.block_bytes, threads)


def files_needed(manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> set[str]:
    """Which files `load_tensors` would read on this rank. :raises: as it does."""
    return {want.chunk.file for want in wants_of("", manifest, targets)}


def load_shared(storage: Readable, folder: str, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> int:
    """As `load_tensors`, but what all ranks hold whole is read by one of them and sent to the others.

    Worth it where the ranks reach each other faster than the storage, as GPUs that NCCL joins: with GPUs, it is what
    lies on them that is sent. With gloo, every rank reads faster than it is sent anything. All ranks must reach this,
    with the same names.

    :returns: how many bytes this rank has read.
    :raises Damaged: on all ranks, if one of them has found something.
    :raises OSError: on all ranks, if one of them can't reach it.
    :raises StateError: see `load_tensors`.
    """
    targets = without_tied(manifest, targets)
    rank, world = dist.get_rank(), dist.get_world_size()
    gpus = torch.cuda.is_initialized()
    shared = {
        name: target.detach()
        for name, target in sorted(targets.items())
        if not isinstance(target, DTensor) and target.is_contiguous() and target.is_cuda == gpus and target.numel()
    }
    # The largest first, one to each rank by turns.
    owners = {name: turn % world for turn, name in enumerate(sorted(shared, key=lambda name: -shared[name].nbytes))}
    own = {name: target for name, target in targets.items() if owners.get(name, rank) == rank}
    problem, read = None, 0
    try:
        read = load_tensors(storage, folder, manifest, own)
    except (Damaged, OSError) as error:
        problem = type(error) is not Damaged, f"rank {rank}: {error}"
    problems: list[tuple[bool, str] | None] = [None] * world
    dist.all_gather_object(problems, problem)
    if found := sorted(filter(None, problems)):
        passing, text = found[0]
        raise OSError(text) if passing else Damaged(text)
    for work in [dist.broadcast(target, src=owners[name], async_op=True) for name, target in shared.items()]:
        work.wait()
    return read


def read_manifest(storage: Storage, folder: str, name: str, expected: str) -> tuple[bytes, Manifest]:
    """The manifest and the bytes that it was read from, after a check of its digest and of all files' sizes.

    :raises Damaged: something isn't as it was saved.
    """
    with damaged_by(folder):
        for _ in looks(storage):
            data = storage.read(f"{folder}/{name}")
            if digest(data) == expected:
                break
        else:
            raise Damaged(f"{folder}/{name} is not the one that was committed")
        manifest = Manifest.from_json(data)
        found = storage.files(folder)
        for file, size in manifest.files.items():
            inside(f"{folder}/{file}", storage.root)
            if file not in found:
                raise Damaged(f"{folder}/{file} is missing")
            if found[file].bytes != size:
                raise Damaged(f"{folder}/{file} has {found[file].bytes} bytes, not {size}")
    return data, manifest


class Reader(StorageReader):
    """Reads one checkpoint for `dcp.load`.

    :param storage: the run folder.
    :param folder: the checkpoint's folder in it.
    :param manifest: its manifest, the digest of which has been checked.
    :ivar bytes_read: how many bytes this rank has read.
    """

    def __init__(self, storage: Readable, folder: str, manifest: Manifest) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._chunks = {
            (name, tuple(chunk.offsets)): (item, chunk)
            for name, item in manifest.tensors.items()
            for chunk in item.chunks
        }
        leaves = leaves_of(manifest.tree)
        self._values = {name: leaf for name, (_, leaf) in leaves.items() if name not in manifest.tensors}
        self.bytes_read = 0

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        step: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Reader:
        """The newest good checkpoint of a run folder, or that of a step; or a checkpoint's own folder.

        :param storage_options: how a URL is reached, see `Config.storage_options`.
        :raises: see `loading.find`.
        """
        from dtrain.checkpoint.loading import find  # which needs this module

        found = find(source, step, storage_options)
        return cls(found.storage, found.folder, found.manifest)

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
        return Metadata(state_dict_metadata=tensors | {name: BytesStorageMetadata() for name in self._values})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """:raises Damaged: a byte isn't what was saved. :raises StateError: a tensor has another type."""
        wants: list[Want] = []
        loaded = []
        for request in plan.items:
            name = request.storage_index.fqn
            if request.type == LoadItemType.BYTE_IO:
                # DCP wants a pickle: it gets one that was made here and now of the manifest's value.
                stream = io.BytesIO()
                torch.save(self._values[name], stream)
                stream.seek(0)
                planner.load_bytes(request, stream)
                continue
            item, chunk = self._chunk(request.storage_index)
            target = planner.resolve_tensor(request).detach()
            check_type(name, dtype_named(item.dtype), target)
            wants.append(Want(name, chunk, target.dtype, request.storage_offsets, target))
            loaded.append((request, target))
        once = dict(enumerate(wants))
        apart: list[tuple[Want, Want]] = []
        for first, again in tied({number: want.target for number, want in once.items()}):
            one, other = wants[first], once.pop(again)
            if (one.chunk[3:], one.start) != (other.chunk[3:], other.start):
                raise untied(one.name, other.name)
            if not one.chunk.digests:  # which would tell if what was saved is the same
                once[again] = other._replace(target=torch.empty_like(other.target))
                apart.append((one, once[again]))
        self.bytes_read += read_blocks(self._storage, self._folder, once.values(), self._manifest.block_bytes)
        for one, other in apart:
            if bytes_of(plain(one.target)) != bytes_of(plain(other.target)):
                raise untied(one.name, other.name)
        for request, target in loaded:
            planner.commit_tensor(request, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _chunk(self, index: MetadataIndex) -> tuple[TensorItem, Chunk]:
        return self._chunks[index.fqn, tuple(index.offset or ())]
