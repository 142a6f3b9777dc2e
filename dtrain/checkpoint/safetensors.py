"""Files of safetensors, on a disk or in a bucket, described by the places of their tensors: only heads are read here.

A file is eight bytes for the length of its header, the header as JSON, and the tensors' bytes. Several files have an
index, which names the file of each tensor.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from dtrain.checkpoint.format import Chunk, TensorItem, numbers
from dtrain.checkpoint.tree import dtype_name
from dtrain.errors import StateError
from dtrain.storage.base import Storage

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"

TYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types that safetensors knows, with its names for them."""

_LONGEST_HEADER = 100_000_000
"""Bytes. The longest that readers of safetensors take."""


def read_safetensors(storage: Storage, file: str) -> tuple[dict[str, TensorItem], dict[str, int]]:
    """The tensors of one file, or of the several that an index names.

    :param file: at the top of the storage.
    :returns: the tensors, and the sizes of the files that they lie in.
    :raises StateError: it can't be read, or leads out of its folder.
    """
    place = f"{storage.root}/{file}"
    try:
        if file.endswith(".json"):
            where: dict[str, str] = json.loads(storage.read(file))["weight_map"]
            for name in where.values():
                if "/" in name or name in ("", ".", ".."):
                    raise StateError(f"{place} leads to {name!r}, out of its folder; it is not opened")
            names = sorted(set(where.values()))
        else:
            where, names = {}, [file]
        there = storage.files(".")
        if missing := [name for name in names if name not in there]:
            raise StateError(f"{place}: the file {missing[0]} is missing")
        sizes = {name: there[name].bytes for name in names}
        tensors: dict[str, TensorItem] = {}
        for name in names:
            for key, item in _items(storage, name, sizes[name]).items():
                if where and where.get(key) != name:
                    continue
                tensors[key] = item
        if lost := sorted(where.keys() - tensors.keys()):
            raise ValueError(f"{lost[0]} is not in the file that the index names")
    except FileNotFoundError as error:
        raise StateError(f"{place} doesn't exist") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise StateError(f"{place} is no safetensors that can be read ({error})") from error
    return tensors, sizes


def _items(storage: Storage, file: str, size: int) -> dict[str, TensorItem]:
    types = {name: dtype for dtype, name in TYPES.items()}
    length = int.from_bytes(_read(storage, file, 0, 8), "little")
    if length > min(_LONGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in {file}, which has {size}")
    header: dict[str, Any] = json.loads(_read(storage, file, 8, length))
    items = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in types:
            raise StateError(f"{storage.root}/{file}: {key} is of type {entry['dtype']}, which dtrain can't read")
        dtype, shape, (begin, end) = types[entry["dtype"]], numbers(entry["shape"]), numbers(entry["data_offsets"])
        start = 8 + length + begin
        if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{key} of shape {shape} can't lie at bytes {begin} to {end}")
        chunk = Chunk(file, start, end - begin, b"", 0, [0] * len(shape), shape)
        items[key] = TensorItem(dtype_name(dtype), shape, [chunk])
    return items


def _read(storage: Storage, file: str, offset: int, length: int) -> bytes:
    data = bytearray(length)
    storage.read_into(file, offset, [memoryview(data)])
    return bytes(data)
