"""`Indexes`: the two indexes of an attempt, the manifest for dtrain and `.metadata` for stock DCP.

`.metadata` is a pickle with two objects for every chunk: to make them all, and to pickle them, would take a job of a
thousand ranks ten seconds. They differ in a few names and numbers alone. So one of each kind is pickled, with holes,
and the holes are filled in by hand, in the opcodes of Python's pickle protocol 2 (PEP 307, `pickletools`). What comes
back often, such as names and sizes, is made once at the beginning of the stream and referred to by its number.
"""

from __future__ import annotations

import io
import json
import math
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
    known = pickled.references.get  # half a million times, a call of one's own is too much
    for part in parts:
        file = pickled.text(part.file)
        for name, offset, length, *box in json.loads(part.items):
            if box:
                offsets, sizes = tuple(box[1]), tuple(box[2])
                start = known(offsets) or pickled.size(offsets)
                held[name] += math.prod(sizes)
                boxes[name].append(chunk % (start, known(sizes) or pickled.size(sizes)))
                places.append(of_box % (known(name) or pickled.text(name), start))
            else:
                values.append(name)
                places.append(of_value % pickled.text(name))
            places.append(place % (file, _number(offset), _number(length)))

    kinds: dict[str, bytes] = {}
    entries: list[bytes] = []
    for name, (dtype, shape) in shapes.items():
        check_whole(name, shape, len(boxes[name]), held[name])
        if dtype not in kinds:
            properties = TensorProperties(dtype=dtype_named(dtype))
            kinds[dtype] = pickled.template(TensorStorageMetadata(properties, _HOLE, _HOLE))
        entries += pickled.text(name), kinds[dtype] % (pickled.size(tuple(shape)), b"](" + b"".join(boxes[name]) + b"e")
    of_bytes = pickled.template(BytesStorageMetadata()) % ()
    for name in values:
        entries += pickled.text(name), of_bytes
    paths = {name: path for name, (path, _) in leaves_of(json.loads(tree)).items()}
    whole = pickled.template(Metadata(state_dict_metadata=_HOLE, planner_data=paths, storage_data=_HOLE))
    return pickled.stream(whole % tuple(b"}(" + b"".join(each) + b"u" for each in (entries, places)))


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

    def template(self, sample: object) -> bytes:
        """An object's opcodes, to be filled in by `%`, since it has holes."""
        stream = io.BytesIO()
        pickler = _Sample(stream, self)
        pickler.dump(sample)
        body = stream.getvalue()[2:-1].replace(b"%", b"%%")  # without the beginning and the end of a pickle

        def filled(mark: re.Match[bytes]) -> bytes:
            return b"%b" if mark[1] == b"hole" else _reference(int(mark[1])).replace(b"%", b"%%")

        return _MARK.sub(filled, body)

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


def _reference(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def _number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
