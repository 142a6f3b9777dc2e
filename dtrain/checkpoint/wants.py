"""Which bytes a tensor needs: what it takes of each chunk of a checkpoint, however either of them is cut."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint.planner_helpers as dcp_helpers
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.blocks import Want
from dtrain.checkpoint.format import Manifest, TensorItem
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.tree import dtype_name, dtype_named
from dtrain.errors import Damaged, StateError

K = TypeVar("K")


def wants_of(
    folder: str, manifest: Manifest, targets: Mapping[str, torch.Tensor], cast: Container[str] = ()
) -> list[Want]:
    """What this rank's parts of the targets take.

    :param folder: the checkpoint's, for messages.
    :param cast: names of those whose type may differ from the saved one.
    :raises StateError: see `load_tensors`.
    :raises Damaged: what was saved of a tensor isn't the whole of what is needed.
    """
    boxes: dict[Any, _Box] = {}
    with torch.no_grad():  # a DTensor's own part is had at once then
        return [
            want
            for name, target in without_tied(manifest, targets).items()
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


def without_tied(manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
    check_type(name, dtype, target, cast)
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


def check_type(name: str, dtype: torch.dtype, target: torch.Tensor, cast: bool = False) -> None:
    """:raises StateError: the target has another type."""
    if dtype != target.dtype and not cast:
        raise StateError(
            f"{name}: saved as {dtype_name(dtype)}, to be loaded into {dtype_name(target.dtype)}; load it into a "
            "tensor of the saved type, and convert that"
        )
