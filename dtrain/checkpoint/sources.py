"""`open_source`: whatever holds weights, described as a checkpoint.

    a run folder, or its URL        its newest checkpoint that is good, or that of a step
    a checkpoint's folder           with the digest that its run's log has of it, where it lies in a run
    a folder of stock DCP           see `foreign`
    model.safetensors, its folder, or model.safetensors.index.json; or the URL of one of them
    a file of torch.save            mapped into memory and read with `weights_only=True`

What comes out is a storage, a folder in it, and a manifest, as of a checkpoint that dtrain has saved. Only that of
dtrain itself has digests. Nothing is ever run that is in a file.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.checkpoint.catalog import CHECKPOINTS, epoch_of
from dtrain.checkpoint.foreign import Made, read_stock
from dtrain.checkpoint.format import BLOCK_BYTES, MANIFEST, METADATA, Chunk, Manifest, Piece, TensorItem, hash_item
from dtrain.checkpoint.log import FOLDER, Log, is_entry
from dtrain.checkpoint.newest import newest_good
from dtrain.checkpoint.ranking import best_step
from dtrain.checkpoint.reader import read_manifest
from dtrain.checkpoint.records import load_plain
from dtrain.checkpoint.safetensors import INDEX_SUFFIX, SUFFIX, read_safetensors
from dtrain.checkpoint.state import RUN
from dtrain.checkpoint.tree import Tree, dtype_name, dtype_named, encode, flatten
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError
from dtrain.storage.base import Storage, looks
from dtrain.storage.local import LocalStorage
from dtrain.storage.places import is_remote, on_disk, storage_at

Kind = Literal["checkpoint", "dcp", "safetensors", "torch"]
Step = int | Literal["best"] | None
Options = Mapping[str, Any] | None
WEB = ("http://", "https://")


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
    passed_over: Sequence[str] = ()
    """Of newer checkpoints of the run that are damaged, each in a sentence."""

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
                    raise Damaged(f"{self.storage.root}/{file}: {error} ({self._name_of(piece)})") from error
                if not piece.digests or hash_item(data, block) == piece.digests[16 * number : 16 * number + 16]:
                    break
            else:
                first = piece.offset + start
                raise Damaged(
                    f"{self.storage.root}/{file}: bytes {first} to {first + data.nbytes} are not those that were saved "
                    f"({self._name_of(piece)})"
                )
            yield start, data

    def _name_of(self, piece: Piece | Chunk) -> str:
        named: list[tuple[str, Piece | Chunk]] = [*self.manifest.values.items()]
        named += [(name, chunk) for name, item in self.manifest.tensors.items() for chunk in item.chunks]
        return next(name for name, known in named if known is piece)

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

    def besides(self, name: str) -> list[str]:
        """What `select(name)` leaves out, each as the shortest name that stands for all of it."""
        found: list[str] = []
        tree, before = self.manifest.tree, ""
        for part in name.split("."):
            found += [f"{before}{key}" for key in tree if key != part and f"{before}{key}" != RUN]
            tree, before = tree[part], f"{before}{part}."
        return sorted(dict.fromkeys([*found, *self.refused]))


def open_source(
    path: str | os.PathLike[str], *, step: Step = None, name: str = "model", storage_options: Options = None
) -> Source:
    """Open what may hold weights, by looking at it.

    :param step: which checkpoint of a run folder, by its step, or the best one; without it the newest good one.
    :param name: what weights are called that have no name of their own, as those of safetensors.
    :param storage_options: how a URL is reached, see `Config.storage_options`.
    :raises ConfigError: there is nothing of the kind, or no such step, or nothing that tells which is the best.
    :raises NoGoodCheckpoint: the run has committed nothing, or the checkpoint that was asked for is bad.
    :raises Damaged: it isn't what was saved.
    :raises StateError: it holds what can't be read without running code.
    """
    path = on_disk(path)
    if is_remote(path):
        return _of_url(path.rstrip("/"), step, name, storage_options)
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} doesn't exist")
    if (path / FOLDER).is_dir() and _is_run(LocalStorage(str(path))):
        return _of_run(LocalStorage(str(path)), step)
    _refuse(step, path)
    if path.name == METADATA or path.name == MANIFEST:
        path = path.parent
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _of_checkpoint(path)
        if (path / METADATA).exists():
            storage, manifest, refused = read_stock(str(path))
            manifest = _named(manifest, name)
            return Source(place=str(path), kind="dcp", storage=storage, folder=".", manifest=manifest, refused=refused)
        return _of_safetensors(LocalStorage(str(path)), "", name)
    if path.name.endswith((SUFFIX, ".json")):
        return _of_safetensors(LocalStorage(str(path.parent)), path.name, name)
    return _of_torch_save(path, name)


def _is_run(storage: Storage) -> bool:
    """Whether it is a run folder, and no other one that somebody keeps logs in."""
    names = storage.names(".")
    return FOLDER in names and (CHECKPOINTS in names or any(map(is_entry, storage.names(FOLDER))))


def _refuse(step: Step, place: object) -> None:
    if step is not None:
        raise ConfigError(f"step={step} can be asked of a run folder only, and {place} is none")


def _of_url(url: str, step: Step, name: str, options: Options) -> Source:
    if url.startswith(WEB):
        raise ConfigError(f"{url}: of the web dtrain reads nothing; copy the files to a disk and name them there")
    run, _, attempt = url.rpartition(f"/{CHECKPOINTS}/")
    if epoch_of(attempt) >= 0 and step is None:
        return _of_attempt(storage_at(run, options), attempt)
    if url.endswith((SUFFIX, INDEX_SUFFIX)):
        _refuse(step, url)
        folder, _, file = url.rpartition("/")
        return _of_safetensors(storage_at(folder, options), file, name)
    storage = storage_at(url, options)
    if _is_run(storage):
        return _of_run(storage, step)
    _refuse(step, url)
    files = storage.files(".")
    if MANIFEST in files:
        return _of_copy(storage, url)
    if any(file.endswith(SUFFIX) for file in files):
        return _of_safetensors(storage, "", name)
    raise ConfigError(
        f"{url} is no run, no checkpoint and no safetensors, which are what dtrain reads of a URL; copy other weights "
        "to a disk and name them there"
    )


def _of_run(storage: Storage, step: Step) -> Source:
    number = best_step(storage) if step == "best" else step
    commit, manifest, passed_over = newest_good(storage, Log(storage), number)
    return _committed(storage, commit.attempt, manifest, passed_over)


def _committed(storage: Storage, attempt: str, manifest: Manifest, passed_over: Sequence[str] = ()) -> Source:
    folder = f"{CHECKPOINTS}/{attempt}"
    place = f"{storage.root}/{folder}"
    return Source(
        place=place, kind="checkpoint", storage=storage, folder=folder, manifest=manifest, passed_over=passed_over
    )


def _of_checkpoint(path: Path) -> Source:
    run = path.resolve().parent.parent
    if path.resolve().parent.name == CHECKPOINTS and (run / FOLDER).is_dir():
        return _of_attempt(LocalStorage(str(run)), path.resolve().name)
    return _of_copy(LocalStorage(str(path)), str(path))


def _of_copy(storage: Storage, place: str) -> Source:
    """What lies in no run: there is nobody to ask for the digest of the manifest but itself."""
    for look in reversed(looks(storage)):
        try:
            data = storage.read(MANIFEST)
            Manifest.check_own_digest(data)
            manifest = Manifest.from_json(data)
            break
        except Damaged as error:
            if look == 0:
                raise Damaged(f"{place}/{MANIFEST}: {error}") from error
    return Source(place=place, kind="checkpoint", storage=storage, folder=".", manifest=manifest)


def _of_attempt(storage: Storage, attempt: str) -> Source:
    """:raises NoGoodCheckpoint: the run's log doesn't know it as a good one, nor as the only one of its step."""
    run = storage.root
    log = Log(storage)
    log.refresh()
    for entry in log.bad():
        if entry.attempt == attempt:
            commit, manifest, passed_over = newest_good(storage, log, entry.step)
            if commit.attempt == attempt:
                return _committed(storage, attempt, manifest, passed_over)
            raise NoGoodCheckpoint(f"{run}/{CHECKPOINTS}/{attempt} failed its check: {entry.reason}")
    for entry in log.commits():
        if entry.attempt == attempt:
            _, manifest = read_manifest(storage, f"{CHECKPOINTS}/{attempt}", MANIFEST, entry.manifest)
            return _committed(storage, attempt, manifest)
    raise NoGoodCheckpoint(f"{run}/{CHECKPOINTS}/{attempt} was never committed, or is about to be deleted")


def _of_safetensors(storage: Storage, file: str, name: str) -> Source:
    """:param file: in the storage; empty is the only one there, or the index of all of them."""
    if not file:
        names = list(storage.files("."))
        found = [n for n in names if n.endswith(INDEX_SUFFIX)] or [n for n in names if n.endswith(SUFFIX)]
        if len(found) != 1:
            what = "several files of safetensors; name one of them" if found else "neither a run nor weights in it"
            raise ConfigError(f"{storage.root} has {what}")
        file = found[0]
    tensors, sizes = read_safetensors(storage, file)
    manifest = _named(_manifest(tensors, {key: {"$tensor": key} for key in tensors}, sizes), name)
    place = f"{storage.root}/{file}"
    return Source(place=place, kind="safetensors", storage=storage, folder=".", manifest=manifest)


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
