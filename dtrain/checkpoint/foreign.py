"""What stock DCP saved, described as a manifest, without running anything that is in it.

DCP's index `.metadata` is a pickle, and so is every item: see `records` for how they are read. A plain value is read by
`torch.load(weights_only=True)`, or refused.

The bytes have no digests, since stock DCP takes none: what was damaged there can't be told from what was saved.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from dtrain.checkpoint.format import METADATA, Chunk, Manifest, TensorItem, numbers
from dtrain.checkpoint.layout import bytes_of, plain
from dtrain.checkpoint.records import BROKEN, Record, Records, load_plain, payload_of
from dtrain.checkpoint.tree import Tree, dtype_name, encode
from dtrain.errors import StateError
from dtrain.storage.base import Storage
from dtrain.storage.local import LocalStorage

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Where earlier versions of torch kept them.
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    # The folder that it was saved to, which nobody asks for.
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath"},
}


class Made(LocalStorage):
    """A folder beside whose files there are tensors that are put together only when somebody reads them.

    :ivar tensors: how to get them, by the names that stand for a file of their bytes.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.tensors: dict[str, Callable[[], torch.Tensor]] = {}
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def add(self, name: str, tensor: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int]) -> Chunk:
        """:returns: the whole tensor as a chunk."""
        file = f"tensor {name}"
        self.tensors[file] = tensor
        return Chunk(file, 0, math.prod(shape) * dtype.itemsize, b"", 0, [0] * len(shape), list(shape))

    def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
        file = path.removeprefix("./")
        if file not in self.tensors:
            super().read_into(path, offset, buffers)
            return
        last, tensor = self._last
        if last != file:
            tensor = plain(self.tensors[file]())
            self._last = (file, tensor)
        data = bytes_of(tensor)
        for buffer in buffers:
            if offset + buffer.nbytes > data.nbytes:
                raise EOFError(f"{path} ends at byte {data.nbytes}")
            buffer.cast("B")[:] = data[offset : offset + buffer.nbytes]
            offset += buffer.nbytes


def read_stock(root: str) -> tuple[Storage, Manifest, dict[str, str]]:
    """Open a folder that stock DCP has saved.

    :returns: the storage, in which the checkpoint's folder is `.`; the manifest; and the values that can't be read
        without running code, each with the reason.
    :raises StateError: it isn't such a folder, or names what it may not name.
    """
    storage = Made(root)
    place = f"{root}/{METADATA}"
    try:
        index = Records(io.BytesIO(storage.read(METADATA)), place, _CLASSES).load()
        entries: dict[str, Record] = index["state_dict_metadata"]
        places = {(key["fqn"], key.state.get("offset")): info for key, info in index["storage_data"].items()}
        paths: dict[str, tuple[str | int, ...]] = index["planner_data"] or {}
        files = {file: os.stat(f"{root}/{file}").st_size for file in sorted({_file(i, place) for i in places.values()})}
        leaves: list[tuple[tuple[str | int, ...], Any]] = []
        tensors: dict[str, TensorItem] = {}
        refused: dict[str, str] = {}
        for name, entry in entries.items():
            path = tuple(paths.get(name) or (name,))
            dotted = ".".join(map(str, path))
            if entry.name == "TensorStorageMetadata":
                tensors[dotted] = _tensor(storage, name, entry, places, files)
                leaves.append((path, torch.empty(0)))
            else:
                try:
                    leaves.append((path, _value(storage, places[name, None], files)))
                except pickle.UnpicklingError as error:
                    refused[dotted] = str(error)
    except BROKEN as error:
        raise StateError(f"{place} is no index of DCP that can be read ({type(error).__name__}: {error})") from error
    except FileNotFoundError as error:
        raise StateError(f"{root}: a file of the checkpoint is missing ({error.filename})") from error
    manifest = Manifest(
        step=0, world_size=0, tree=encode(_nested(leaves)), tensors=tensors, values={}, files=files, metadata=""
    )
    manifest.check_whole()
    return storage, manifest, refused


def _file(info: Record, place: str) -> str:
    file = info["relative_path"]
    parts = PurePosixPath(file)
    if parts.is_absolute() or ".." in parts.parts or parts.name in ("", METADATA):
        raise StateError(f"{place} leads to {file!r}, out of the checkpoint's folder; it is not opened")
    if info.state.get("transform_descriptors"):
        raise StateError(
            f"{file} was saved through {', '.join(info.state['transform_descriptors'])}; save it again without "
            "extensions"
        )
    return str(parts)


def _tensor(
    storage: Made,
    name: str,
    entry: Record,
    places: dict[tuple[str, Any], Record],
    files: dict[str, int],
) -> TensorItem:
    dtype, layout = entry["properties"].state[:2]
    if not isinstance(dtype, torch.dtype) or getattr(layout, "args", ("torch.strided",)) != ("torch.strided",):
        raise StateError(f"{name}: a tensor of {dtype}, {getattr(layout, 'args', layout)} can't be opened")
    shape = numbers(entry["size"])
    item = TensorItem(dtype_name(dtype), shape, [])
    for number, box in enumerate(entry["chunks"]):
        offsets, sizes = numbers(box["offsets"]), numbers(box["sizes"])
        if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name} of shape {shape} has no box of {sizes} at {offsets}")
        info = places.get((name, tuple(offsets))) or places[name, None]
        file, offset, length = _range(info, files)
        payload = payload_of(storage, file, offset, length, dtype, sizes)
        if payload is not None:
            item.chunks.append(Chunk(file, offset, length, b"", payload, offsets, sizes))
        else:
            made = storage.add(f"{name} {number}", _loader(storage, name, info, files, dtype, sizes), dtype, sizes)
            item.chunks.append(made._replace(offsets=offsets))
    return item


def _range(info: Record, files: dict[str, int]) -> tuple[str, int, int]:
    file = str(PurePosixPath(info["relative_path"]))
    offset, length = numbers((info["offset"], info["length"]))
    if offset + length > files[file]:
        raise ValueError(f"{file} has {files[file]} bytes, and an item of {length} at {offset}")
    return file, offset, length


def _read(storage: Storage, info: Record, files: dict[str, int]) -> io.BytesIO:
    file, offset, length = _range(info, files)
    data = bytearray(length)
    storage.read_into(file, offset, [memoryview(data)])
    return io.BytesIO(data)


def _value(storage: Storage, info: Record, files: dict[str, int]) -> Tree:
    """:raises pickle.UnpicklingError: it could only be read by running code."""
    value = load_plain(_read(storage, info, files))
    try:
        encode(value)
    except StateError as error:
        raise pickle.UnpicklingError(str(error)) from error
    return value


def _loader(
    storage: Storage, name: str, info: Record, files: dict[str, int], dtype: torch.dtype, sizes: list[int]
) -> Callable[[], torch.Tensor]:
    """For a tensor whose bytes don't lie in a row in the file, such as a transposed one."""

    def load() -> torch.Tensor:
        try:
            tensor = load_plain(_read(storage, info, files))
        except pickle.UnpicklingError as error:
            raise StateError(f"{name}: can't be read without running code ({error})") from error
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, list(tensor.shape)) != (dtype, sizes):
            raise StateError(f"{name}: the index tells of {dtype} {sizes}, and the file holds something else")
        return tensor

    return load


def _nested(leaves: list[tuple[tuple[str | int, ...], Any]]) -> Tree:
    """The tree whose leaves have these paths: a text is a dict's key, a number a place in a list."""
    root: dict[str | int, Any] = {}
    for path, leaf in leaves:
        branch = root
        for key in path[:-1]:
            branch = branch.setdefault(key, _Branch())
        branch[path[-1]] = leaf

    def finished(branch: Any) -> Any:
        if branch is not root and not isinstance(branch, _Branch):
            return branch
        if branch and all(isinstance(key, int) for key in branch):
            return [finished(branch[key]) for key in sorted(branch)]
        return {str(key): finished(value) for key, value in branch.items()}

    return finished(root)


class _Branch(dict[str | int, Any]):
    """Tells the tree's own dicts from those that are values."""
