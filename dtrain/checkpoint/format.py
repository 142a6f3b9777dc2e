"""What a checkpoint folder holds, and how its manifest says it.

    __0_0.distcp  __1_0.distcp  ...     one shard file a rank, in DCP's own form
    .metadata                           DCP's index, for stock `dcp.load`; dtrain never reads it, since it is a pickle
    manifest.json                       where every item lies, with digests; dtrain reads this alone

The manifest is put together from parts, one a rank, of which only the digests change from save to save: the texts that
tell where things lie are made once and used again. So a save of a thousand ranks costs its coordinator a few copies.

    {"version": 1, "torch": ..., "block_bytes": ..., "step": ..., "world_size": ...,
     "metadata": [size, digest] of .metadata,
     "tree": the state as JSON, see `tree`,
     "tensors": {name: [dtype, shape]},
     "files": {file: {"size": ..., "digests": base64, "items": [item, ...]}},
     "digest": of all bytes before this key; manifests from before there was one go without}

An item is `[name, offset, length]` for the pickled copy of a plain value, which only stock DCP reads, and
`[name, offset, length, payload, offsets, sizes]` for a box of a tensor. `digests` holds 16 bytes for each block of each
item, in order. What is committed has a digest of the whole manifest in its run's log; the manifest's own is for folders
that no log knows.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash

from dtrain.checkpoint.machine import no_collection
from dtrain.checkpoint.tree import Tree
from dtrain.errors import Damaged, StateError

MANIFEST = "manifest.json"
METADATA = ".metadata"
VERSION = 1
BLOCK_BYTES = 4 << 20
"""An item has one digest for every block of so many bytes, counted from its beginning."""
DIGEST_BYTES = 16


class Piece(NamedTuple):
    """A range of bytes in a shard file: the pickled copy of a plain value."""

    file: str
    offset: int
    length: int
    digests: bytes
    """xxh3-128 of each block; empty where nobody knows them, as in a checkpoint that stock DCP has written."""


class Chunk(NamedTuple):
    """A piece that holds a box of a tensor, inside the frame that `torch.save` puts around it."""

    file: str
    offset: int
    length: int
    digests: bytes
    """As in `Piece`."""
    payload: int
    """Where the tensor's own bytes begin, counted from `offset`."""
    offsets: list[int]
    """The box's first element, one number per dimension."""
    sizes: list[int]
    """The box's extent."""


class TensorItem(NamedTuple):
    """A tensor of the state, which may be cut into several chunks."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one rank adds to a manifest: its shard file."""

    file: str
    size: int
    items: str
    """The JSON array of its items."""
    digests: bytes

    def to_json(self) -> str:
        text = base64.b64encode(self.digests).decode()
        return f'{json.dumps(self.file)}:{{"size":{self.size},"digests":"{text}","items":{self.items}}}'


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The index of one checkpoint."""

    step: int
    world_size: int
    """Of the ranks that wrote it; any number may read it."""
    tree: Tree
    """The state as JSON, see `tree.encode`."""
    tensors: dict[str, TensorItem]
    values: dict[str, Piece]
    """Copies of the values in `tree`, which stock DCP reads."""
    files: dict[str, int]
    """Sizes in bytes."""
    metadata: str
    """Digest of the file `.metadata`."""
    torch: str = torch.__version__
    block_bytes: int = BLOCK_BYTES
    version: int = field(default=VERSION)

    @staticmethod
    def join(parts: Iterable[Part], *, step: int, world_size: int, tree: str, tensors: str, index: bytes) -> bytes:
        """The file's bytes, made of what the ranks have said.

        :param tree: the state as JSON text.
        :param tensors: JSON text of every tensor's type and shape.
        :param index: the file `.metadata`.
        """
        head = {"version": VERSION, "torch": torch.__version__, "block_bytes": BLOCK_BYTES, "step": step}
        head |= {"world_size": world_size, "metadata": [len(index), digest(index)]}
        files = ",".join(part.to_json() for part in parts)
        data = f'{json.dumps(head)[:-1]},"tree":{tree},"tensors":{tensors},"files":{{{files}}}'.encode()
        return data + _end_of(data)

    @classmethod
    @no_collection()
    def from_json(cls, data: bytes) -> Manifest:
        """
        :raises Damaged: it is no manifest.
        :raises StateError: it is one of a later version.
        """
        try:
            fields = json.loads(data)
            if fields["version"] > VERSION:
                raise StateError(
                    f"the checkpoint's manifest is of version {fields['version']}, written by a newer dtrain; this one "
                    f"knows versions up to {VERSION}: install the newer one, or start in another run folder"
                )
            tensors = {name: TensorItem(dtype, shape, []) for name, (dtype, shape) in fields.pop("tensors").items()}
            values: dict[str, Piece] = {}
            block = fields["block_bytes"]
            for file, part in fields["files"].items():
                digests = base64.b64decode(part["digests"])
                used = 0
                for name, offset, length, *box in part["items"]:
                    end = used + DIGEST_BYTES * -(-length // block)
                    if box:
                        tensors[name].chunks.append(Chunk._make((file, offset, length, digests[used:end], *box)))
                    else:
                        values[name] = Piece(file, offset, length, digests[used:end])
                    used = end
                if digests and used != len(digests):
                    raise ValueError(f"{len(digests)} bytes of digests for {file}, not {used}")
            fields.pop("digest", None)
            size, fields["metadata"] = fields["metadata"]
            fields["files"] = {file: part["size"] for file, part in fields["files"].items()} | {METADATA: size}
            return cls(tensors=tensors, values=values, **fields)
        except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise Damaged(f"no manifest that can be read ({error})") from error

    @staticmethod
    def check_own_digest(data: bytes) -> None:
        """For a manifest of which no log has a digest. One from before there was an own digest passes.

        :raises Damaged: the bytes aren't those that were written.
        """
        start = len(data) - len(_end_of(b""))
        if data[start:] == _end_of(memoryview(data)[:start]):
            return
        try:
            # Not looked for in the bytes: an editor may have written the key in another way, or a line's end behind it.
            # A key that is damaged isn't taken for one that is missing: `from_json` knows none of its name.
            has_own = "digest" in json.loads(data)
        except (ValueError, TypeError) as error:
            raise Damaged(f"no manifest that can be read ({error})") from error
        if has_own:
            raise Damaged("the manifest's bytes are not those that its own digest was made of")

    def check_whole(self) -> None:
        """:raises StateError: the chunks of a tensor aren't the whole of it, once."""
        for name, item in self.tensors.items():
            check_whole(name, item.shape, len(item.chunks), sum(math.prod(chunk.sizes) for chunk in item.chunks))


def _end_of(data: bytes | memoryview) -> bytes:
    """The last key of a manifest that begins with `data`."""
    return f',"digest":"{digest(data)}"}}'.encode()


def check_whole(name: str, shape: list[int], chunks: int, elements: int) -> None:
    """:raises StateError: so many chunks with so many elements aren't the whole of a tensor, once."""
    if elements != math.prod(shape) or not chunks:
        raise StateError(
            f"{name}: the ranks have saved {elements} elements of a tensor of shape {tuple(shape)}; "
            "they don't hold the same model"
        )


def numbers(values: Iterable[Any]) -> list[int]:
    """Sizes, or places, out of a file that somebody else has written. :raises ValueError: they can't be any."""
    listed = list(values)
    if not all(type(number) is int and number >= 0 for number in listed):
        raise ValueError(f"{listed} are no sizes")
    return listed


def tensors_to_json(shapes: Mapping[str, tuple[str, Iterable[int]]]) -> str:
    """The manifest's `tensors`, of every tensor's type and shape."""
    return json.dumps({name: [dtype, list(shape)] for name, (dtype, shape) in shapes.items()}, separators=(",", ":"))


def hash_item(data: memoryview, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The digests of an item that lies in memory."""
    return b"".join(
        xxhash.xxh3_128_digest(data[start : start + block_bytes]) for start in range(0, data.nbytes, block_bytes)
    )


class BlockHasher:
    """Digests of a stream, block by block. Needs no copy of what it is given."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block = block_bytes
        self._left = block_bytes
        self._hash = xxhash.xxh3_128()
        self._digests: list[bytes] = []

    def update(self, data: memoryview) -> None:
        while data.nbytes:
            part = data[: self._left]
            self._hash.update(part)
            self._left -= part.nbytes
            data = data[part.nbytes :]
            if self._left == 0:
                self._close()

    def digests(self) -> bytes:
        """Of all that was given; ends the stream."""
        if self._left < self._block:
            self._close()
        return b"".join(self._digests)

    def _close(self) -> None:
        self._digests.append(self._hash.digest())
        self._hash = xxhash.xxh3_128()
        self._left = self._block


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes, as hexadecimal text."""
    return xxhash.xxh3_128_hexdigest(data)


def json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
