"""Loading a checkpoint by its manifest: a rank reads the parts that it needs, and checks every byte before it is used.

    load_tensors(storage, folder, manifest, {"model.weight": tensor, ...})

Each rank works out for itself what it needs, for plain tensors and DTensors alike, however the checkpoint was cut.
Nothing is unpickled. `Reader` does the same for `dcp.load` in anybody's loop:

    dcp.load(state, storage_reader=Reader.open("runs/x"))
"""

from __future__ import annotations

import io
import math
import operator
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.planner_helpers as dcp_helpers
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
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.tree import dtype_name, dtype_named, leaves_of
from dtrain.errors import Damaged, StateError
from dtrain.storage.base import Readable, Storage, inside, looks

K = TypeVar("K")


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
    return read_blocks(storage, folder, _all_wants(folder, manifest, targets, cast), manifest.block_bytes, threads)


def files_needed(manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> set[str]:
    """Which files `load_tensors` would read on this rank. :raises: as it does."""
    return {want.chunk.file for want in _all_wants("", manifest, targets)}


def _all_wants(
    folder: str, manifest: Manifest, targets: Mapping[str, torch.Tensor], cast: Container[str] = ()
) -> list[Want]:
    boxes: dict[Any, _Box] = {}
    with torch.no_grad():  # a DTensor's own part is had at once then
        return [
            want
            for name, target in _once(manifest, targets).items()
            for want in _wants(folder, name, manifest.tensors.get(name), target, name in cast, boxes)
        ]


def tied(targets: Mapping[K, torch.Tensor]) -> Iterator[tuple[K, K]]:
    """The targets that lie in the memory of one before them, after that one's name."""
    parts = [target._local_tensor if isinstance(target, DTensor) else target for target in targets.values()]
    addresses = [part.data_ptr() for part in parts]
    if len(set(addresses)) == len(addresses):  # as nearly always, and at a third of the time
        return
    first: dict[Any, K] = {}
    for name, part in zip(targets, parts, strict=True):
        one = first.setdefault((part.data_ptr(), part.dtype, part.shape, part.stride()), name)
        if one != name and part.numel():
            yield one, name


def untied(one: str, other: str) -> StateError:
    return StateError(
        f"{one} and {other} are one tensor now, and two different ones were saved; untie them, or load without one"
    )


def _once(manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The targets but those that are tied to one before them: two threads would write to them.

    :raises StateError: what was saved of them isn't the same.
    """
    found = dict(targets)
    for names in tied(targets):
        saved = [
            (item.dtype, item.shape, sorted((chunk.offsets, chunk.sizes, chunk.digests) for chunk in item.chunks))
            for item in map(manifest.tensors.get, names)
            if item is not None
        ]
        if len(saved) == 2:
            if saved[0] != saved[1]:
                raise untied(*names)
            del found[names[1]]
    return found


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
    targets = _once(manifest, targets)
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


_Box = tuple[list[int], list[int]]
"""Where a rank's part of a tensor begins, and its extent."""


def _wants(
    folder: str, name: str, item: TensorItem | None, target: torch.Tensor, cast: bool, boxes: dict[Any, _Box]
) -> Iterator[Want]:
    """What a target takes of each chunk.

    :param boxes: of DTensors, by what they depend on, since to work one out costs more than all the rest.
    """
    if item is None:
        raise StateError(f"{name}: not in the checkpoint {folder}; leave it out")
    if list(target.shape) != item.shape:
        raise StateError(f"{name}: saved with shape {tuple(item.shape)}, to be loaded into {tuple(target.shape)}")
    dtype = dtype_named(item.dtype)
    _check_type(name, dtype, target, cast)
    part = local_part(target)
    if part.requires_grad:
        part = part.detach()
    if not isinstance(target, DTensor):
        starts, sizes = [0] * part.dim(), item.shape
    else:
        key = (target.device_mesh, target.placements, target.shape)
        if key not in boxes:
            (box,) = dcp_helpers._create_chunk_list(target)
            boxes[key] = list(box.offsets), list(box.sizes)
        starts, sizes = boxes[key]
    for chunk in item.chunks:
        if chunk.sizes == sizes and chunk.offsets == starts:  # saved as it is wanted
            yield Want(name, chunk, dtype, [0] * part.dim(), part)
            return
    left = math.prod(sizes)
    if not left:
        return
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    # As many elements may still be the wrong ones, where chunks overlap: then their middle is somewhere else.
    moment = left * math.prod(map(operator.add, starts, stops))
    for chunk in item.chunks:
        if chunk.sizes and (chunk.offsets[0] >= stops[0] or chunk.offsets[0] + chunk.sizes[0] <= starts[0]):
            continue
        inside, within, middle = [], part, 1
        for dim, (start, stop, at, size) in enumerate(zip(starts, stops, chunk.offsets, chunk.sizes, strict=True)):
            low, high = max(start, at), min(stop, at + size)
            if low >= high:
                break
            inside.append(low - at)
            middle *= low + high
            if high - low != within.shape[dim]:
                within = within.narrow(dim, low - start, high - low)
        else:
            count = within.numel()
            left -= count
            moment -= count * middle
            yield Want(name, chunk, dtype, inside, within)
    if left or moment:
        raise Damaged(f"{folder}: the chunks of {name} leave out {left} of the elements that are needed, or overlap")


def _check_type(name: str, dtype: torch.dtype, target: torch.Tensor, cast: bool = False) -> None:
    """:raises StateError: the target has another type."""
    if dtype != target.dtype and not cast:
        raise StateError(
            f"{name}: saved as {dtype_name(dtype)}, to be loaded into {dtype_name(target.dtype)}; load it into a "
            "tensor of the saved type, and convert that"
        )


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
            _check_type(name, dtype_named(item.dtype), target)
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
