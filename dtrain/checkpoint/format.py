"""What a checkpoint folder holds, and how its manifest says it.

    __0_0.distcp  __1_0.distcp  ...     one shard file a rank, in DCP's own form
    .metadata                           DCP's index, for stock `dcp.load`; dtrain never reads it, since it is a pickle
    manifest.json                       where every item lies, with digests; dtrain reads this alone

The state that is saved is a tree of dicts, lists and plain values with tensors at some leaves. The manifest holds the
tree itself as JSON, a tensor being a reference to its item; so nothing is ever unpickled on the way back.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from dtrain.errors import Damaged, StateError

MANIFEST = "manifest.json"
METADATA = ".metadata"
VERSION = 1
BLOCK_BYTES = 4 << 20
"""An item has one digest for every block of so many bytes."""

Tree = Any
"""Nested dicts, lists and tuples of plain values and tensors."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of bytes in a shard file."""

    file: str
    offset: int
    length: int
    digests: list[str]
    """xxh3-128 of each block of `BLOCK_BYTES`, the first one beginning at `offset`."""


@dataclass(frozen=True, kw_only=True)
class Chunk(Piece):
    """A piece that holds a box of a tensor, inside the frame that `torch.save` puts around it."""

    payload: int
    """Where the tensor's own bytes begin, counted from `offset`."""
    offsets: list[int]
    """The box's first element, one number per dimension."""
    sizes: list[int]
    """The box's extent."""


@dataclass(frozen=True, kw_only=True)
class TensorItem:
    """A tensor of the state, which may be cut into several chunks."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The index of one checkpoint."""

    step: int
    world_size: int
    """Of the ranks that wrote it; any number may read it."""
    tree: Tree
    """The state as JSON, see `encode`."""
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

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
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
            tensors = {
                key: TensorItem(**{**item, "chunks": [Chunk(**chunk) for chunk in item["chunks"]]})
                for key, item in fields.pop("tensors").items()
            }
            values = {key: Piece(**piece) for key, piece in fields.pop("values").items()}
            return cls(tensors=tensors, values=values, **fields)
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"no manifest that can be read ({error})") from error


class BlockHasher:
    """Digests of a stream, block by block. Needs no copy of what it is given."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block = block_bytes
        self._left = block_bytes
        self._hash = xxhash.xxh3_128()
        self._digests: list[str] = []

    def update(self, data: memoryview) -> None:
        while data.nbytes:
            part = data[: self._left]
            self._hash.update(part)
            self._left -= part.nbytes
            data = data[part.nbytes :]
            if self._left == 0:
                self._close()

    def digests(self) -> list[str]:
        """Of all that was given; ends the stream."""
        if self._left < self._block:
            self._close()
        return self._digests

    def _close(self) -> None:
        self._digests.append(self._hash.hexdigest())
        self._hash = xxhash.xxh3_128()
        self._left = self._block


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes, as hexadecimal text."""
    return xxhash.xxh3_128_hexdigest(data)


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """:raises StateError: this torch has no such type."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"tensor type {name!r} is unknown to torch {torch.__version__}; install the one that saved it")
    return dtype


def flatten(tree: Tree) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    """The leaves of a tree by dotted name, each with its path; a list of plain values is one leaf.

    These are the names that DCP gives to the same tree (`torch.distributed.checkpoint._traverse`), but that DCP would
    pickle a tuple with its tensors in it.

    :raises StateError: two leaves have the same name.
    """
    leaves: dict[str, tuple[tuple[str | int, ...], Any]] = {}

    def visit(path: tuple[str | int, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit((*path, str(key)), inner)
        elif _is_branch(value):
            for index, inner in enumerate(value):
                visit((*path, index), inner)
        else:
            name = ".".join(map(str, path))
            if name in leaves:
                raise StateError(f"two values in the state are called {name!r}; rename one of them")
            leaves[name] = (path, value)

    visit((), tree)
    return leaves


def _is_branch(value: Any) -> bool:
    if isinstance(value, list) and any(
        isinstance(v, Mapping) or (isinstance(v, list) and _is_branch(v)) for v in value
    ):
        return True
    return isinstance(value, list | tuple) and _holds_tensor(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)


def encode(tree: Tree, path: str = "") -> Any:
    """A tree as JSON. What JSON has no form for becomes an object with one key that begins with `$`.

    :raises StateError: it holds something that could come back only by unpickling.
    """
    at = f"{path}." if path else ""
    match tree:
        case None | bool() | str():
            return tree
        case torch.Tensor():
            if tree.layout != torch.strided or tree.is_meta or tree.is_quantized:
                kind = "meta" if tree.is_meta else "quantized" if tree.is_quantized else dtype_name(tree.layout)
                raise StateError(f"{path}: a {kind} tensor can't be saved; let state_dict() return a plain one")
            return {"$tensor": path}
        case np.generic() | np.ndarray():
            array = np.asarray(tree)
            if array.dtype.hasobject or array.dtype.names or isinstance(tree, np.ma.MaskedArray):
                raise StateError(
                    f"{path}: a numpy array of {array.dtype} can't be saved; make it a plain one of numbers"
                )
            data = base64.b64encode(array.tobytes()).decode()
            return {"$numpy": [array.dtype.str, None if isinstance(tree, np.generic) else array.shape, data]}
        case int() | float() if type(tree) in (int, float):
            return tree if math.isfinite(tree) else {"$float": repr(tree)}
        case bytes():
            return {"$bytes": base64.b64encode(tree).decode()}
        case torch.dtype():
            return {"$dtype": dtype_name(tree)}
        case torch.device():
            return {"$device": str(tree)}
        case torch.Size() | tuple():
            kind = "$size" if isinstance(tree, torch.Size) else "$tuple"
            return {kind: [encode(value, f"{at}{i}") for i, value in enumerate(tree)]}
        case list():
            return [encode(value, f"{at}{i}") for i, value in enumerate(tree)]
        case set() | frozenset():
            kind = "$set" if isinstance(tree, set) else "$frozenset"
            return {kind: sorted((_encode_hashed(value, path) for value in tree), key=repr)}
        case Mapping():
            if all(isinstance(key, str) and not key.startswith("$") for key in tree):
                return {key: encode(value, f"{at}{key}") for key, value in tree.items()}
            items = [[_encode_hashed(key, path), encode(value, f"{at}{key}")] for key, value in tree.items()]
            return {"$items": items}
    raise StateError(
        f"{path}: a {type(tree).__qualname__} can't be saved without pickle; let state_dict() return numbers, "
        "texts, tensors, and lists, tuples and dicts of them"
    )


def _encode_hashed(value: Any, path: str) -> Any:
    """A dict's key or a set's element: a tensor there has no name that it could be found by."""
    if isinstance(value, torch.Tensor) or _holds_tensor(value):
        raise StateError(f"{path}: a tensor in a set, or as a key, can't be saved; keep it in a list or as a value")
    return encode(value, path)


def decode(value: Any, tensor: Callable[[str], torch.Tensor]) -> Tree:
    """The tree that was encoded; `tensor` gives the tensor of each reference.

    :raises Damaged: it isn't the outcome of `encode`.
    """

    def inner(value: Any) -> Tree:
        return decode(value, tensor)

    if isinstance(value, list):
        return [inner(v) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": str(key)}:
            return tensor(key)
        case {"$numpy": [str(dtype), shape, str(data)]}:
            array = np.frombuffer(base64.b64decode(data), dtype=dtype).copy()
            return array[0] if shape is None else array.reshape(shape)
        case {"$float": str(text)}:
            return float(text)
        case {"$bytes": str(data)}:
            return base64.b64decode(data)
        case {"$dtype": str(name)}:
            return dtype_named(name)
        case {"$device": str(name)}:
            return torch.device(name)
        case {"$size": list(items)}:
            return torch.Size(inner(v) for v in items)
        case {"$tuple": list(items)}:
            return tuple(inner(v) for v in items)
        case {"$set": list(items)}:
            return {inner(v) for v in items}
        case {"$frozenset": list(items)}:
            return frozenset(inner(v) for v in items)
        case {"$items": list(items)}:
            return {inner(k): inner(v) for k, v in items}
    if any(key.startswith("$") for key in value):
        raise Damaged(f"unknown value {next(iter(value))!r} in the manifest")
    return {key: inner(v) for key, v in value.items()}
