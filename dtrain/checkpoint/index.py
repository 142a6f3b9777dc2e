"""`Indexes`: the two indexes of an attempt, the manifest for dtrain and `.metadata` for stock DCP.

`.metadata` is a pickle with two objects for every chunk: to make them all, and to pickle them, would take a job of a
thousand ranks ten seconds. They differ in a few names and numbers alone. So one of each kind is pickled, with holes,
and the holes are filled in by hand, in the opcodes of Python's pickle protocol 2 (PEP 307, `pickletools`). What comes
back often, such as names and sizes, is made once at the beginning of the stream and referred to by its number.
"""

from __future__ import annotations

import functools
import io
import json
import math
import operator
import pickle
import re
import struct
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dtrain.checkpoint.format import MANIFEST, METADATA, Manifest, Part, check_whole, digest, json_text
from dtrain.checkpoint.machine import no_collection
from dtrain.checkpoint.tree import dtype_named, leaves_of
from dtrain.storage.base import Storage

_VALUE = 3
"""Fields of an item that is no box of a tensor, see `format`."""


class Indexes:
    """Writes them. What stays the same from save to save is made once.

    :ivar bytes: of the two that were written last.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._key: object = None
        self._tensors = ""
        self._index = b""

    def write(
        self,
        storage: Storage,
        folder: str,
        parts: list[Part],
        *,
        step: int,
        world_size: int,
        tree: str,
        tensors: Iterable[str],
        key: object = None,
    ) -> str:
        """Write `.metadata` and the manifest of an attempt whose shard files are durable.

        :param tree: JSON text of the state.
        :param tensors: JSON texts of the types and shapes of the tensors, which may say the same several times.
        :param key: equal to the last one where only the tensors' bytes and `tree` have changed.
        :returns: the manifest's digest.
        :raises StateError: the parts don't make up the whole of every tensor.
        """
        if key is None or key != self._key:
            self._tensors = self.merged(tensors)
            self._index = dcp_index(parts, tree, self._tensors)
            self._key = key
        data = Manifest.join(
            parts, step=step, world_size=world_size, tree=tree, tensors=self._tensors, index=self._index
        )
        for name, content in ((METADATA, self._index), (MANIFEST, data)):
            with storage.open_new(f"{folder}/{name}") as sink:
                sink.write(content)
        storage.seal(folder)
        self.bytes = len(self._index) + len(data)
        return digest(data)

    @staticmethod
    def merged(tensors: Iterable[str]) -> str:
        """One JSON text of types and shapes, of several."""
        merged: dict[str, Any] = {}
        for text in dict.fromkeys(tensors):  # most ranks say the same
            merged |= json.loads(text)
        return json_text(merged)


@no_collection()
def dcp_index(parts: Iterable[Part], tree: str, tensors: str) -> bytes:
    """The file `.metadata` that stock DCP goes by.

    :param tree: JSON text of the state.
    :param tensors: JSON text of every tensor's type and shape.
    :raises StateError: the parts don't make up the whole of every tensor.
    """
    shapes: dict[str, tuple[str, list[int]]] = json.loads(tensors)
    pickled = _Opcodes()
    chunk = pickled.template(ChunkStorageMetadata(_HOLE, _HOLE))
    place = pickled.template(_StorageInfo(_HOLE, _HOLE, _HOLE))
    whole_key, key = MetadataIndex(_HOLE), MetadataIndex(_HOLE)
    object.__setattr__(key, "offset", _HOLE)
    of_value, of_box = pickled.template(whole_key), pickled.template(key)

    boxes: dict[str, list[bytes]] = {name: [] for name in shapes}
    held = dict.fromkeys(shapes, 0)
    values: list[str] = []
    places: list[bytes] = []
    # This comes half a million times, so nothing is made anew that was there before: most files are laid out alike.
    known, elements = pickled.references.get, functools.cache(math.prod)
    extent = functools.cache(lambda sizes: chunk[1] + pickled.size(sizes) + chunk[2])
    box_of = functools.cache(lambda name: of_box[0] + pickled.text(name) + of_box[1])
    lies_at = functools.cache(lambda offset, length: place[1] + _number(offset) + place[2] + _number(length) + place[3])
    for part in parts:
        lies_in = place[0] + pickled.text(part.file)
        for item in json.loads(part.items):
            name = item[0]
            if len(item) > _VALUE:
                offsets, sizes = tuple(item[4]), tuple(item[5])
                start = known(offsets) or pickled.size(offsets)
                held[name] += elements(sizes)
                boxes[name] += chunk[0], start, extent(sizes)
                places += box_of(name), start, of_box[2], lies_in, lies_at(item[1], item[2])
            else:
                values.append(name)
                places += _filled(of_value, pickled.text(name)), lies_in, lies_at(item[1], item[2])

    kinds: dict[str, list[bytes]] = {}
    entries: list[bytes] = []
    for name, (dtype, shape) in shapes.items():
        check_whole(name, shape, len(boxes[name]) // 3, held[name])  # three pieces for each box
        if dtype not in kinds:
            properties = TensorProperties(dtype=dtype_named(dtype))
            kinds[dtype] = pickled.template(TensorStorageMetadata(properties, _HOLE, _HOLE))
        chunks = b"](" + b"".join(boxes[name]) + b"e"
        entries += pickled.text(name), _filled(kinds[dtype], pickled.size(tuple(shape)), chunks)
    (of_bytes,) = pickled.template(BytesStorageMetadata())
    for name in values:
        entries += pickled.text(name), of_bytes
    paths = {name: path for name, (path, _) in leaves_of(json.loads(tree)).items()}
    whole = pickled.template(Metadata(state_dict_metadata=_HOLE, planner_data=paths, storage_data=_HOLE))
    return pickled.stream(_filled(whole, *(b"}(" + b"".join(each) + b"u" for each in (entries, places))))


_HOLE = cast(Any, object())
"""In the place of what is filled in."""

_MARK = re.compile(rb"X.{4}\x00(hole|\d+)\x00Q", re.DOTALL)
"""What a pickler writes for a hole, or for what has a number."""


class _Opcodes:
    """Pickles that are put together by hand."""

    def __init__(self) -> None:
        self._made: list[bytes] = []
        self.references: dict[Any, bytes] = {}
        """The opcodes that stand for what has a number."""

    def stream(self, body: bytes) -> bytes:
        """The whole pickle: what has a number, and an object that refers to it."""
        return b"\x80\x02" + b"".join(self._made) + body + b"."

    def template(self, sample: object) -> list[bytes]:
        """An object's opcodes, in pieces: what comes before, between and behind its holes."""
        stream = io.BytesIO()
        _Sample(stream, self).dump(sample)
        body, pieces, at = stream.getvalue()[2:-1], [b""], 0  # without the beginning and the end of a pickle
        for mark in _MARK.finditer(body):
            pieces[-1] += body[at : mark.start()]
            at = mark.end()
            if mark[1] == b"hole":
                pieces.append(b"")
            else:
                pieces[-1] += _reference(int(mark[1]))
        pieces[-1] += body[at:]
        return pieces

    def text(self, value: str) -> bytes:
        if value not in self.references:
            data = value.encode("utf-8", "surrogatepass")
            self._make(value, b"X" + struct.pack("<I", len(data)) + data)
        return self.references[value]

    def size(self, numbers: tuple[int, ...]) -> bytes:
        """A `torch.Size`."""
        if numbers not in self.references:
            self._make(numbers, self.name(torch.Size) + b"(" + b"".join(map(_number, numbers)) + b"t\x85R")
        return self.references[numbers]

    def name(self, kind: type) -> bytes:
        """A class, by its name."""
        if kind not in self.references:
            self._make(kind, f"c{kind.__module__}\n{kind.__qualname__}\n".encode())
        return self.references[kind]

    def number_of(self, value: str | type) -> int:
        """By which a text or a class is referred to."""
        reference = self.text(value) if isinstance(value, str) else self.name(value)
        return int.from_bytes(reference[1:], "little")

    def _make(self, key: Any, opcodes: bytes) -> None:
        number = len(self._made)
        self.references[key] = _reference(number)
        self._made.append(opcodes + b"r" + struct.pack("<I", number) + b"0")


class _Sample(pickle.Pickler):
    """Marks holes, texts and classes, of which `persistent_id` is asked like of every object."""

    def __init__(self, file: io.BytesIO, opcodes: _Opcodes) -> None:
        super().__init__(file, protocol=2)
        self.fast = True  # numbers of its own would collide with ours
        self._opcodes = opcodes

    def persistent_id(self, obj: Any) -> str | None:
        if obj is _HOLE:
            return "\0hole\0"
        return f"\0{self._opcodes.number_of(obj)}\0" if isinstance(obj, str | type) else None


def _filled(template: list[bytes], *values: bytes) -> bytes:
    """An object's opcodes, with something in its holes."""
    return template[0] + b"".join(map(operator.add, values, template[1:]))


def _reference(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def _number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
