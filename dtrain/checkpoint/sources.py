"""`open_source`: whatever holds weights, described as a checkpoint.

    a run folder, or its URL        its newest checkpoint that is good, or that of a step
    a checkpoint's folder           with the digest that its run's log has of it, where it lies in a run
    a folder of stock DCP           see `foreign`
    model.safetensors, its folder, or model.safetensors.index.json
    a file of torch.save            mapped into memory and read with `weights_only=True`

What comes out is a storage, a folder in it, and a manifest, as of a checkpoint that dtrain has saved. Only that of
dtrain itself has digests. Nothing is ever run that is in a file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.foreign import Made, read_stock
from dtrain.checkpoint.format import BLOCK_BYTES, MANIFEST, METADATA, Chunk, Manifest, Piece, TensorItem, hash_item
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.reader import read_manifest
from dtrain.checkpoint.records import load_plain
from dtrain.checkpoint.state import RUN
from dtrain.checkpoint.tree import Tree, dtype_name, dtype_named, encode, flatten
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError
from dtrain.storage.base import Storage, looks
from dtrain.storage.local import LocalStorage
from dtrain.storage.places import is_remote, storage_at

SAFETENSORS_TYPES: dict[torch.dtype, str] = {
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

_INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000
"""Bytes. The longest that readers of safetensors take."""

Kind = Literal["checkpoint", "dcp", "safetensors", "torch"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What can be read like a checkpoint."""

    place: str
    """For messages."""
    kind: Kind
    storage: Storage
    folder: str
    """In the storage."""
    manifest: Manifest
    refused: Mapping[str, str] = field(default_factory=dict)
    """Values that are left out, since only running code would give them, each with the reason."""

    def blocks(self, piece: Piece | Chunk) -> Iterator[tuple[int, memoryview]]:
        """An item's bytes, block by block, each with its place in the item; they hold until the next is asked for.

        :raises Damaged: a block isn't what was saved, or can't be read to its end.
        """
        block = self.manifest.block_bytes
        memory = memoryview(bytearray(min(block, piece.length)))
        file = f"{self.folder}/{piece.file}"
        for number, start in enumerate(range(0, piece.length, block)):
            data = memory[: piece.length - start]
            for _ in looks(self.storage):
                try:
                    self.storage.read_into(file, piece.offset + start, [data])
                except (EOFError, FileNotFoundError) as error:
                    raise Damaged(f"{self.storage.root}/{file}: {error}") from error
                if not piece.digests or hash_item(data, block) == piece.digests[16 * number : 16 * number + 16]:
                    break
            else:
                first = piece.offset + start
                raise Damaged(
                    f"{self.storage.root}/{file}: bytes {first} to {first + data.nbytes} are not those that were saved"
                )
            yield start, data

    def payload(self, item: TensorItem, chunk: Chunk) -> Iterator[tuple[int, memoryview]]:
        """A box's own bytes, each part with its place in the box."""
        size = math.prod(chunk.sizes) * dtype_named(item.dtype).itemsize
        for at, data in self.blocks(chunk):
            low, high = max(at, chunk.payload), min(at + data.nbytes, chunk.payload + size)
            if low < high:
                yield low - chunk.payload, data[low - at : high - at]

    def in_tensor(self, item: TensorItem, chunk: Chunk) -> Iterator[tuple[int, memoryview]]:
        """A box's own bytes, each part with its place in the whole tensor."""
        itemsize = dtype_named(item.dtype).itemsize
        # From the last dimension that the box has only a part of on, its elements lie in a row in the tensor too.
        cut = max((d for d, size in enumerate(chunk.sizes) if size != item.shape[d]), default=0)
        row = math.prod(chunk.sizes[cut:]) * itemsize
        stride = math.prod(item.shape[cut:]) * itemsize
        first = math.prod(item.shape[cut + 1 :]) * (chunk.offsets[cut] if chunk.offsets else 0) * itemsize
        for at, data in self.payload(item, chunk):
            while data:
                number, inside = divmod(at, row)
                part = data[: row - inside]
                outer = 0  # the row's number among those of the tensor
                rest = number
                weight = 1
                for size, offset, extent in zip(
                    reversed(chunk.sizes[:cut]), reversed(chunk.offsets[:cut]), reversed(item.shape[:cut]), strict=True
                ):
                    rest, index = divmod(rest, size)
                    outer += (index + offset) * weight
                    weight *= extent
                yield outer * stride + first + inside, part
                at += part.nbytes
                data = data[part.nbytes :]

    def select(self, name: str | None) -> tuple[dict[str, TensorItem], Tree]:
        """The tensors of an object, or of a part of one, and its tree, both without its name before the tensors'.

        :param name: may be dotted; None is all of the state.
        :raises StateError: there is no such object, it has no tensors, or only running code could read it.
        """
        tree = self.manifest.tree
        for part in name.split(".") if name else ():
            if not isinstance(tree, dict) or part not in tree:
                known = ", ".join(key for key in self.manifest.tree if key != RUN) or "nothing"
                raise StateError(f"{self.place} has no {name!r}; it holds: {known}")
            tree = tree[part]
        before = f"{name}." if name else ""
        for key, reason in self.refused.items():
            if key == name or key.startswith(before):
                raise StateError(f"{self.place}: {key} can't be read without running code ({reason})")
        items = {key.removeprefix(before): self.manifest.tensors[key] for key in tensor_names(tree)}
        if not items:
            raise StateError(f"{self.place}: {name} holds no tensors")
        return items, renamed(tree, before, "")


def open_source(path: str | os.PathLike[str], *, step: int | None = None, name: str = "model") -> Source:
    """Open what may hold weights, by looking at it.

    :param step: which checkpoint of a run folder; without it the newest one.
    :param name: what weights are called that have no name of their own, as those of safetensors.
    :raises ConfigError: there is nothing of the kind, or no such step.
    :raises NoGoodCheckpoint: the run has committed nothing, or the checkpoint that was asked for is bad.
    :raises Damaged: it isn't what was saved.
    :raises StateError: it holds what can't be read without running code.
    """
    if is_remote(path):
        return _of_url(os.fspath(path).rstrip("/"), step)
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} doesn't exist")
    if path.is_dir() and (path / FOLDER).is_dir():
        return _of_run(str(path), step)
    if step is not None:
        raise ConfigError(f"step={step} can be asked of a run folder only, and {path} is none")
    if path.name == METADATA or path.name == MANIFEST:
        path = path.parent
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _of_checkpoint(path)
        if (path / METADATA).exists():
            storage, manifest, refused = read_stock(str(path))
            manifest = _named(manifest, name)
            return Source(place=str(path), kind="dcp", storage=storage, folder=".", manifest=manifest, refused=refused)
        found = sorted(path.glob(f"*{_INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            what = "several files of safetensors; name one of them" if found else "neither a run nor weights in it"
            raise ConfigError(f"{path} has {what}")
        path = found[0]
    if path.name.endswith((".safetensors", ".json")):
        manifest = _of_safetensors(path, name)
        return Source(
            place=str(path), kind="safetensors", storage=LocalStorage(str(path.parent)), folder=".", manifest=manifest
        )
    return _of_torch_save(path, name)


def _of_url(url: str, step: int | None) -> Source:
    run, _, attempt = url.rpartition(f"/{CHECKPOINTS}/")
    if run and step is None:
        return _of_attempt(run, attempt)
    storage = storage_at(url)
    if FOLDER in storage.names("."):
        return _of_run(url, step)
    if MANIFEST in storage.files("."):
        manifest = Manifest.from_json(storage.read(MANIFEST))
        return Source(place=url, kind="checkpoint", storage=storage, folder=".", manifest=manifest)
    raise ConfigError(f"{url} is neither a run nor a checkpoint; of other weights dtrain reads files on a disk only")


def _of_run(path: str, step: int | None) -> Source:
    storage = storage_at(path)
    log = Log(storage)
    log.refresh()
    commits = log.commits()
    if step is not None:
        known = ", ".join(str(entry.step) for entry in commits) or "none"
        commits = [entry for entry in commits if entry.step == step]
        if not commits:
            raise ConfigError(f"{path} has no good checkpoint of step {step}; there are: {known}")
    if not commits:
        raise NoGoodCheckpoint(f"{path} has no good checkpoint")
    return of_commit(storage, commits[-1])


def of_commit(storage: Storage, commit: Entry) -> Source:
    """:raises Damaged: the manifest isn't the one that was committed, or a file is missing or has another size."""
    folder = f"{CHECKPOINTS}/{commit.attempt}"
    _, manifest = read_manifest(storage, folder, MANIFEST, commit.manifest)
    place = f"{storage.root}/{folder}"
    return Source(place=place, kind="checkpoint", storage=storage, folder=folder, manifest=manifest)


def _of_checkpoint(path: Path) -> Source:
    run = path.resolve().parent.parent
    if path.resolve().parent.name == CHECKPOINTS and (run / FOLDER).is_dir():
        return _of_attempt(str(run), path.resolve().name)
    # A copy that somebody has made: there is nobody to ask for the digest of the manifest.
    manifest = Manifest.from_json((path / MANIFEST).read_bytes())
    return Source(place=str(path), kind="checkpoint", storage=LocalStorage(str(path)), folder=".", manifest=manifest)


def _of_attempt(run: str, attempt: str) -> Source:
    """:raises NoGoodCheckpoint: the run's log doesn't know it as a good one."""
    storage = storage_at(run)
    log = Log(storage)
    log.refresh()
    for entry in log.entries:
        if entry.kind == "bad" and entry.attempt == attempt:
            raise NoGoodCheckpoint(f"{run}/{CHECKPOINTS}/{attempt} failed its check: {entry.reason}")
    for entry in log.commits():
        if entry.attempt == attempt:
            return of_commit(storage, entry)
    raise NoGoodCheckpoint(f"{run}/{CHECKPOINTS}/{attempt} was never committed, or is about to be deleted")


def _of_safetensors(path: Path, name: str) -> Manifest:
    """Of one file, or of the several that an index names."""
    try:
        if path.name.endswith(".json"):
            where: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
            for file in where.values():
                if "/" in file or file in ("", ".", ".."):
                    raise StateError(f"{path} leads to {file!r}, out of its folder; it is not opened")
            files = sorted(set(where.values()))
        else:
            where, files = {}, [path.name]
        tensors: dict[str, TensorItem] = {}
        for file in files:
            for key, item in _safetensors_items(path.parent / file).items():
                if where and where.get(key) != file:
                    continue
                tensors[key] = item
        if missing := sorted(where.keys() - tensors.keys()):
            raise ValueError(f"{missing[0]} is not in the file that the index names")
        sizes = {file: (path.parent / file).stat().st_size for file in files}
    except FileNotFoundError as error:
        raise StateError(f"{path}: the file {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{path} is no safetensors that can be read ({error})") from error
    return _named(_manifest(tensors, {key: {"$tensor": key} for key in tensors}, sizes), name)


def _safetensors_items(path: Path) -> dict[str, TensorItem]:
    types = {name: dtype for dtype, name in SAFETENSORS_TYPES.items()}
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in {path.name}, which has {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    items = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in types:
            raise StateError(f"{path}: {key} is of type {entry['dtype']}, which dtrain can't read")
        dtype, shape, (begin, end) = types[entry["dtype"]], list(entry["shape"]), entry["data_offsets"]
        start = 8 + length + begin
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{key} of shape {shape} can't lie at bytes {begin} to {end}")
        chunk = Chunk(path.name, start, end - begin, b"", 0, [0] * len(shape), shape)
        items[key] = TensorItem(dtype_name(dtype), shape, [chunk])
    return items


def _of_torch_save(path: Path, name: str) -> Source:
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # the form before torch 1.6 can't be mapped
        tree = load_plain(path, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{path} is no file of torch.save that can be read without running code ({error}); save it "
            "anew with tensors and plain values only"
        ) from error
    if not isinstance(tree, Mapping):
        raise StateError(f"{path} holds a {type(tree).__qualname__}, not a dict of weights")
    storage = Made(str(path.parent))
    tensors = {}
    for key, (_, leaf) in flatten(tree).items():
        if isinstance(leaf, torch.Tensor):
            shape = list(leaf.shape)
            chunk = storage.add(key, lambda leaf=leaf: leaf, leaf.dtype, shape)  # type: ignore[misc]
            tensors[key] = TensorItem(dtype_name(leaf.dtype), shape, [chunk])
    manifest = _named(_manifest(tensors, encode(tree), {}), name)
    return Source(place=str(path), kind="torch", storage=storage, folder=".", manifest=manifest)


def _manifest(tensors: dict[str, TensorItem], tree: Tree, files: dict[str, int]) -> Manifest:
    return Manifest(
        step=0,
        world_size=0,
        tree=tree,
        tensors=tensors,
        values={},
        files=files,
        metadata="",
        block_bytes=BLOCK_BYTES,
    )


def _named(manifest: Manifest, name: str) -> Manifest:
    """Weights that lie at the top of the tree get a name, as the objects that a run tracks have one."""
    for key, value in manifest.tree.items():
        if not _is_tensor(value) and _holds_tensor(value) and not key.endswith("_extra_state"):
            return manifest
    return _manifest(
        {f"{name}.{key}": item for key, item in manifest.tensors.items()},
        {name: renamed(manifest.tree, "", f"{name}.")},
        manifest.files,
    )


def _is_tensor(value: Tree) -> bool:
    return isinstance(value, dict) and isinstance(value.get("$tensor"), str)


def _holds_tensor(value: Tree) -> bool:
    if isinstance(value, dict):
        return _is_tensor(value) or any(map(_holds_tensor, value.values()))
    return isinstance(value, list) and any(map(_holds_tensor, value))


def tensor_names(tree: Tree) -> Iterator[str]:
    """The names of the tensors in a tree, in its order."""
    if _is_tensor(tree):
        yield tree["$tensor"]
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensor_names(value)


def renamed(tree: Tree, old: str, new: str) -> Tree:
    """A tree in which the tensors' names begin with `new` instead of `old`."""
    if isinstance(tree, list):
        return [renamed(value, old, new) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _is_tensor(tree):
        return {"$tensor": new + tree["$tensor"].removeprefix(old)}
    return {key: renamed(value, old, new) for key, value in tree.items()}
