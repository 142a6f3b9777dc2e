"""Pickles read as records, and the frames that `torch.save` puts around a tensor.

A pickle is a program. Here it may make records, tuples and tensor types, and nothing else; no class is imported for it.
Whatever it names beside the few that are expected is an error that tells the name.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast

import torch

from dtrain.errors import StateError
from dtrain.storage.base import Storage

_FRAME_CLASSES = {
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch.storage": {"UntypedStorage"},
}
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
"""What a frame names for the type of its tensor."""
BROKEN = (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError)
"""What a pickle that is no index, or only part of one, ends with."""


class Record:
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


class Records(pickle.Unpickler):
    """Unpickles records.

    :param place: of the pickle, for messages.
    :param classes: what it may name, by module.
    """

    def __init__(self, file: IO[bytes], place: str, classes: Mapping[str, set[str]]) -> None:
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
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if name in self._classes.get(module, ()):
            return type(name, (Record,), {"name": name})
        raise StateError(
            f"{self._place} asks for {module}.{name}, which no checkpoint of tensors needs; it is not opened, since "
            "that could run code. Save it anew with tensors and plain values only"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_plain(file: Any, **options: Any) -> Any:
    """`torch.load` of tensors and plain values alone.

    :raises pickle.UnpicklingError: it needs more than that, or is broken; says why, in short.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forms that it may not know all of; it raises where it doesn't
        try:
            return torch.load(file, weights_only=True, map_location="cpu", **options)
        except OSError:
            raise
        except Exception as error:  # its unpickler raises what it stumbles over
            text = str(error)
            if named := re.search(r"GLOBAL (\S+)", text):
                raise pickle.UnpicklingError(f"it asks for {named[1]}") from error
            # What torch goes on with is advice to run the code all the same.
            _, found, reason = text.partition("WeightsUnpickler error: ")
            raise pickle.UnpicklingError((reason if found else text).strip().partition("\n")[0]) from error


def payload_of(
    storage: Storage, file: str, offset: int, length: int, dtype: torch.dtype, sizes: list[int]
) -> int | None:
    """Where a tensor's bytes begin in its frame; None if they don't lie there in a row, in this machine's order."""
    window = _Window(storage, file, offset, length)
    try:
        with zipfile.ZipFile(cast(IO[bytes], window)) as frame:
            records = {info.filename.partition("/")[2]: info for info in frame.infolist()}
            saved = Records(io.BytesIO(frame.read(records["data.pkl"])), f"{file}, byte {offset}", _FRAME_CLASSES)
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
    except (zipfile.BadZipFile, StateError, *BROKEN):
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
