"""Checkpoints in the forms of others.

    export_weights(source, Path("model.safetensors"))      one file; a folder's name gives shards and their index
    export_weights(source, Path("model.pt"))               one file, for torch.load(..., weights_only=True)

All of it streams: a block of 4 MiB is read, compared with its digest, and written to where it belongs. So memory
doesn't grow with the model, nor with the ways in which ranks have cut a tensor.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from dtrain.checkpoint.format import TensorItem
from dtrain.checkpoint.layout import Sparse
from dtrain.checkpoint.safetensors import TYPES
from dtrain.checkpoint.source import Source
from dtrain.checkpoint.tree import Tree, decode, dtype_named, leaves_of
from dtrain.errors import ConfigError, StateError
from dtrain.storage.local import sync_folder

SHARD_BYTES = 5_000_000_000
"""The size up to which a file of safetensors holds several tensors; what Hugging Face's tools use."""
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

Progress = Callable[[int], object]
"""Is called with the number of bytes that were done since the last time."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    files: list[Path]
    tensors: int
    bytes: int
    """Of the tensors."""
    left_out: list[str]
    """Plain values that the form has no place for."""
    converted: list[str]
    """numpy values that became tensors and numbers, which is how `weights_only=True` can read them."""


@dataclass(frozen=True)
class _File:
    """A file that is to be written."""

    name: str
    size: int
    parts: list[tuple[int, bytes]]
    """What stands around the tensors, each with its offset."""
    places: list[tuple[TensorItem, int]]
    """The tensors, each with its offset."""


def export_weights(
    source: Source,
    destination: Path,
    *,
    name: str | None = "model",
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda done: None,
) -> Exported:
    """Write a checkpoint's tensors in another form, which the destination's name decides.

    A file appears under its name when all of it is on the disk; a process that is killed leaves a hidden one that ends
    with `.half`.

    :param destination: `*.safetensors`, or a file of `torch.save` (`TORCH_SUFFIXES`), or else a folder.
    :param name: the object whose tensors are written, without its name before theirs; None is all of the state.
    :param shard_bytes: the most that a file in a folder holds, if it holds more than one tensor.
    :param force: replace what an earlier export has left there.
    :raises ConfigError: the destination is there already, or its name doesn't tell a form.
    :raises StateError: there is no such object, or the form has no place for a tensor's type.
    :raises Damaged: a block isn't what was saved; nothing is left at the destination.
    """
    items, tree = source.select(name)
    left_out: list[str] = []
    converted: list[str] = []
    folder = destination.suffix == ""
    if destination.suffix == ".safetensors":
        files = [_safetensors(destination.name, items, source.manifest.step)]
    elif folder:
        files = list(_shards(items, shard_bytes, source.manifest.step))
    elif destination.suffix in TORCH_SUFFIXES:
        files = [_torch_save(destination.name, items, tree, converted)]
    else:
        raise ConfigError(
            f"{destination}: a name that ends with .safetensors or {', '.join(TORCH_SUFFIXES)}, or that of a folder, "
            "tells what to write"
        )
    if destination.suffix not in TORCH_SUFFIXES:
        left_out = [key for key, (_, leaf) in leaves_of(tree).items() if not isinstance(leaf, torch.Tensor)]
    with room_at(destination), _appearing(destination, folder=folder, force=force) as half:
        for file in files:
            _write(half / file.name if folder else half, file, source, progress)
    return Exported(
        files=[destination / file.name if folder else destination for file in files],
        tensors=len(items),
        bytes=sum(_nbytes(item) for item in items.values()),
        left_out=left_out,
        converted=converted,
    )


def _nbytes(item: TensorItem) -> int:
    return math.prod(item.shape) * dtype_named(item.dtype).itemsize


def _safetensors(file: str, items: Mapping[str, TensorItem], step: int) -> _File:
    """Eight bytes for the length of the header, the header as JSON, and the tensors' bytes without a gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "step": str(step)}}
    places: list[tuple[TensorItem, int]] = []
    end = 0
    # The wide types come first, so that all of them lie at multiples of their width.
    for key, item in sorted(items.items(), key=lambda pair: (-dtype_named(pair[1].dtype).itemsize, pair[0])):
        kind = TYPES.get(dtype_named(item.dtype))
        if kind is None:
            raise StateError(f"{key}: safetensors has no type for torch.{item.dtype}; export to a .pt file instead")
        if key.encode(errors="replace").decode() != key:
            raise StateError(f"{key!r}: safetensors takes no name that UTF-8 has no form of; export to a .pt file")
        begin, end = end, end + _nbytes(item)
        header[key] = {"dtype": kind, "shape": item.shape, "data_offsets": [begin, end]}
        places.append((item, begin))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return _File(file, start + end, [(0, head)], [(item, start + begin) for item, begin in places])


def _shards(items: Mapping[str, TensorItem], shard_bytes: int, step: int) -> Iterator[_File]:
    shards: list[dict[str, TensorItem]] = [{}]
    held = 0
    for key, item in items.items():
        if shards[-1] and held + _nbytes(item) > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][key] = item
        held += _nbytes(item)
    if len(shards) == 1:
        yield _safetensors("model.safetensors", items, step)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(shard, file)
        yield _safetensors(file, shard, step)
    total = sum(_nbytes(item) for item in items.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, ensure_ascii=False).encode()
    yield _File("model.safetensors.index.json", len(index), [(0, index)], [])


def _torch_save(file: str, items: Mapping[str, TensorItem], tree: Tree, converted: list[str]) -> _File:
    """What `torch.save` would write of the tree, with holes where the tensors' bytes belong."""
    # Imported here, since it takes long and nothing else needs it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    order: list[TensorItem | bytes] = []
    sizes: list[int] = []

    def hole(shape: Sequence[int], dtype: torch.dtype, content: TensorItem | bytes) -> torch.Tensor:
        if 0 not in shape:
            order.append(content)
            sizes.append(math.prod(shape) * dtype.itemsize)
        return torch.empty(tuple(shape), dtype=dtype)

    def plain(value: Any, path: str) -> Any:
        """Goes through the tree in the order in which pickle does."""
        match value:
            case _Reference():
                return hole(value.item.shape, dtype_named(value.item.dtype), value.item)
            case np.generic():
                converted.append(path)
                if not isinstance(value.item(), bool | int | float | complex | str | bytes):
                    raise StateError(
                        f"{path}: a numpy {value.dtype} can't be read with weights_only=True; leave it out of the state"
                    )
                return value.item()
            case np.ndarray():
                converted.append(path)
                try:
                    dtype = torch.from_numpy(np.empty(0, value.dtype)).dtype
                except (TypeError, ValueError) as error:
                    raise StateError(f"{path}: torch has no type for a numpy array of {value.dtype}") from error
                return hole(value.shape, dtype, value.tobytes())
            case frozenset():
                raise StateError(f"{path}: a frozenset can't be read with weights_only=True; leave it out of the state")
            case set():
                return {plain(inner, path) for inner in value}
            case dict():
                named = {key: f"{path}.{key}".strip(".") for key in value}
                return {plain(key, named[key]): plain(inner, named[key]) for key, inner in value.items()}
            case torch.Size():
                return value
            case list() | tuple():
                return type(value)(plain(inner, f"{path}.{i}") for i, inner in enumerate(value))
        return value

    whole = decode(tree, lambda name: cast(torch.Tensor, _Reference(items[name])))
    sparse = Sparse()
    # Fake tensors take no memory, whatever their size.
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(plain(whole, ""), cast(IO[bytes], sparse))
    parts: list[tuple[int, bytearray]] = []
    for offset, data in sorted(sparse.written):
        if parts and parts[-1][0] + len(parts[-1][1]) == offset:
            parts[-1][1].extend(data)
        else:
            parts.append((offset, bytearray(data)))
    ends = [offset + len(data) for offset, data in parts]
    if [start - end for end, (start, _) in zip(ends, parts[1:], strict=False)] != sizes:
        raise RuntimeError(f"torch {torch.__version__} lays out a file in another way than this was written for")
    literal = [(offset, bytes(data)) for offset, data in parts]
    literal += [(end, data) for end, data in zip(ends, order, strict=False) if isinstance(data, bytes)]
    places = [(item, end) for end, item in zip(ends, order, strict=False) if isinstance(item, TensorItem)]
    return _File(file, ends[-1], literal, places)


@dataclass(frozen=True)
class _Reference:
    """Stands in the tree for a tensor of the checkpoint."""

    item: TensorItem


def _write(path: Path, file: _File, source: Source, progress: Progress) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # A disk that is too full says so now.
        os.posix_fallocate(descriptor, 0, file.size)
        for offset, data in file.parts:
            pwrite(descriptor, memoryview(data), offset)
        for item, offset in file.places:
            for chunk in item.chunks:
                for where, body in source.in_tensor(item, chunk):
                    pwrite(descriptor, body, offset + where)
                    progress(body.nbytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


@contextlib.contextmanager
def room_at(place: object) -> Iterator[None]:
    """:raises OSError: there isn't any left; it says where."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"{place}: {os.strerror(error.errno)}; make room there, or choose another place") from error


@contextlib.contextmanager
def _appearing(destination: Path, *, folder: bool, force: bool) -> Iterator[Path]:
    """Where to write what is to appear at the destination when the block ends without an error."""

    def check() -> None:
        if not os.path.lexists(destination):
            return
        if not force:
            raise ConfigError(f"{destination} is there already; --force replaces it")
        if destination.is_dir() != folder:
            raise ConfigError(f"{destination} is {'no ' if folder else 'a '}folder; it is not replaced")
        strange = [p.name for p in destination.iterdir() if not _ours(p.name)] if folder else []
        if strange:
            raise ConfigError(f"{destination} holds {strange[0]}, which no export has written; it is not replaced")

    check()
    destination.parent.mkdir(parents=True, exist_ok=True)
    half = destination.parent / f".{destination.name}.{uuid.uuid4().hex}.half"
    old = half.with_suffix(".old.half")
    if folder:
        half.mkdir()
    try:
        yield half
        check()
        if folder:
            sync_folder(half)
            if destination.exists():
                destination.rename(old)
        half.rename(destination)
        sync_folder(destination.parent)
    finally:
        for path in (half, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _ours(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
