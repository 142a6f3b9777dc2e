"""What stock DCP saved, described as a manifest, without running anything that is in it.

DCP's index `.metadata` is a pickle, and so is every item. A pickle is a program: here it may make records, tuples and
tensor types, and nothing else. No class is imported for it; whatever it names beside the few that such an index is made
of is an error that tells the name. The items' own frames are read in the same way, only to see where the bytes lie; a
plain value is read by `torch.load(weights_only=True)`, or refused.

The bytes have no digests, since stock DCP takes none: what was damaged there can't be told from what was saved.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, cast

import torch

from dtrain.checkpoint.format import METADATA, Chunk, Manifest, TensorItem
from dtrain.checkpoint.layout import bytes_of, plain
from dtrain.checkpoint.tree import Tree, dtype_name, encode
from dtrain.errors import StateError
from dtrain.storage.base import Storage
from dtrain.storage.local import LocalStorage

_METADATA_CLASSES = {
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
_FRAME_CLASSES = {
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch.storage": {"UntypedStorage"},
}
_BROKEN = (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError)
"""What a pickle that is no index, or only part of one, ends with."""


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
        index = _Records(io.BytesIO(storage.read(METADATA)), place, _METADATA_CLASSES).load()
        entries: dict[str, _Record] = index["state_dict_metadata"]
        places = {(key["fqn"], key.state.get("offset")): info for key, info in index["storage_data"].items()}
        paths: dict[str, tuple[str | int, ...]] = index["planner_data"] or {}
        files = {file: storage.size(file) for file in sorted({_file(info, place) for info in places.values()})}
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
                    refused[dotted] = why_refused(error)
    except _BROKEN as error:
        raise StateError(f"{place} is no index of DCP that can be read ({type(error).__name__}: {error})") from error
    except FileNotFoundError as error:
        raise StateError(f"{root}: a file of the checkpoint is missing ({error.filename})") from error
    manifest = Manifest(
        step=0, world_size=0, tree=encode(_nested(leaves)), tensors=tensors, values={}, files=files, metadata=""
    )
    manifest.check_whole()
    return storage, manifest, refused


class _Record:
    """What a pickle made instead of an object of a class."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        return self.state[key]


class _Records(pickle.Unpickler):
    """Unpickles records.

    :param place: of the pickle, for messages.
    :param classes: what it may name, by module.
    """

    def __init__(self, file: IO[bytes], place: str, classes: dict[str, set[str]]) -> None:
        super().__init__(file)
        self._place = place
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == "torch" and name.endswith("Storage") and isinstance(found, type):
            return getattr(found, "dtype", None)
        if name in self._classes.get(module, ()):
            return type(name, (_Record,), {"name": name})
        raise StateError(
            f"{self._place} asks for {module}.{name}, which no checkpoint of tensors needs; it is not opened, since "
            "that could run code. Save it anew with tensors and plain values only"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _file(info: _Record, place: str) -> str:
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
    entry: _Record,
    places: dict[tuple[str, Any], _Record],
    files: dict[str, int],
) -> TensorItem:
    dtype, layout = entry["properties"].state[:2]
    if not isinstance(dtype, torch.dtype) or getattr(layout, "args", ("torch.strided",)) != ("torch.strided",):
        raise StateError(f"{name}: a tensor of {dtype}, {getattr(layout, 'args', layout)} can't be opened")
    shape = _numbers(entry["size"])
    item = TensorItem(dtype_name(dtype), shape, [])
    for number, box in enumerate(entry["chunks"]):
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if len(offsets) != len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name} of shape {shape} has no box of {sizes} at {offsets}")
        info = places.get((name, tuple(offsets))) or places[name, None]
        file, offset, length = _range(info, files)
        payload = _payload(storage, file, offset, length, dtype, sizes)
        if payload is not None:
            item.chunks.append(Chunk(file, offset, length, b"", payload, offsets, sizes))
        else:
            made = storage.add(f"{name} {number}", _loader(storage, name, info, files, dtype, sizes), dtype, sizes)
            item.chunks.append(made._replace(offsets=offsets))
    return item


def _numbers(values: Any) -> list[int]:
    numbers = list(values)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} are no sizes")
    return numbers


def _range(info: _Record, files: dict[str, int]) -> tuple[str, int, int]:
    file = str(PurePosixPath(info["relative_path"]))
    offset, length = _numbers((info["offset"], info["length"]))
    if offset + length > files[file]:
        raise ValueError(f"{file} has {files[file]} bytes, and an item of {length} at {offset}")
    return file, offset, length


def _read(storage: Storage, info: _Record, files: dict[str, int]) -> io.BytesIO:
    file, offset, length = _range(info, files)
    data = bytearray(length)
    storage.read_into(file, offset, [memoryview(data)])
    return io.BytesIO(data)


def _value(storage: Storage, info: _Record, files: dict[str, int]) -> Tree:
    """:raises pickle.UnpicklingError: it could only be read by running code."""
    value = torch.load(_read(storage, info, files), weights_only=True, map_location="cpu")
    try:
        encode(value)
    except StateError as error:
        raise pickle.UnpicklingError(str(error)) from error
    return value


def _loader(
    storage: Storage, name: str, info: _Record, files: dict[str, int], dtype: torch.dtype, sizes: list[int]
) -> Callable[[], torch.Tensor]:
    """For a tensor whose bytes don't lie in a row in the file, such as a transposed one."""

    def load() -> torch.Tensor:
        try:
            tensor = torch.load(_read(storage, info, files), weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise StateError(f"{name}: can't be read without running code ({why_refused(error)})") from error
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, list(tensor.shape)) != (dtype, sizes):
            raise StateError(f"{name}: the index tells of {dtype} {sizes}, and the file holds something else")
        return tensor

    return load


def _payload(storage: Storage, file: str, offset: int, length: int, dtype: torch.dtype, sizes: list[int]) -> int | None:
    """Where a tensor's bytes begin in its frame; None if they don't lie there in a row, in this machine's order."""
    window = _Window(storage, file, offset, length)
    try:
        with zipfile.ZipFile(cast(IO[bytes], window)) as frame:
            records = {info.filename.partition("/")[2]: info for info in frame.infolist()}
            saved = _Records(io.BytesIO(frame.read(records["data.pkl"])), f"{file}, byte {offset}", _FRAME_CLASSES)
            tensor = saved.load()
            if "byteorder" in records and frame.read(records["byteorder"]) != b"little":
                return None
        (_, kind, key, *_), start, size, strides, *more = tensor.args
        if tensor.name == "_rebuild_tensor_v2":
            found, flags = kind, more[2:]
        else:
            found, flags = more[2], more[3:]
        record = records[f"data/{key}"]
        header = window.at(record.header_offset, 30)
    except (zipfile.BadZipFile, StateError, *_BROKEN):
        return None
    payload = record.header_offset + 30 + int.from_bytes(header[26:28], "little")
    payload += int.from_bytes(header[28:30], "little")
    size_bytes = math.prod(sizes) * dtype.itemsize
    if (
        any(flags)
        or (found, start, list(size)) != (dtype, 0, sizes)
        or not _in_a_row(size, strides)
        or record.compress_type != zipfile.ZIP_STORED
        or record.file_size != size_bytes
        or payload + size_bytes > length
    ):
        return None
    return payload


def _in_a_row(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in sizes
        step *= size
    return True


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


def why_refused(error: BaseException) -> str:
    """What torch didn't like, in short: its messages go on with advice to run the code all the same."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {named[1]}"
    _, found, reason = text.partition("WeightsUnpickler error: ")
    return (reason if found else text).strip().partition("\n")[0]


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, storage: Storage, file: str, offset: int, length: int) -> None:
        self._storage = storage
        self._file = file
        self._offset = offset
        self._length = length
        self._at = 0

    def at(self, offset: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self._length - offset)))
        if data:
            self._storage.read_into(self._file, self._offset + offset, [memoryview(data)])
        return bytes(data)

    def read(self, size: int | None = -1) -> bytes:
        data = self.at(self._at, self._length if size is None or size < 0 else size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
