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

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.checkpoint.catalog import CHECKPOINTS, epoch_of
from dtrain.checkpoint.foreign import Made, read_stock
from dtrain.checkpoint.format import BLOCK_BYTES, MANIFEST, METADATA, Manifest, TensorItem
from dtrain.checkpoint.log import FOLDER, Log, is_entry
from dtrain.checkpoint.newest import newest_good
from dtrain.checkpoint.ranking import best_step
from dtrain.checkpoint.reader import read_manifest
from dtrain.checkpoint.records import load_plain
from dtrain.checkpoint.safetensors import INDEX_SUFFIX, SUFFIX, read_safetensors
from dtrain.checkpoint.source import Source
from dtrain.checkpoint.tree import Tree, dtype_name, encode, flatten, is_tensor, renamed
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError
from dtrain.storage.base import Storage, looks
from dtrain.storage.local import LocalStorage
from dtrain.storage.places import is_remote, on_disk, storage_at

Step = int | Literal["best"] | None
Options = Mapping[str, Any] | None
WEB = ("http://", "https://")


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
        if not is_tensor(value) and _holds_tensor(value) and not key.endswith("_extra_state"):
            return manifest
    return _manifest(
        {f"{name}.{key}": item for key, item in manifest.tensors.items()},
        {name: renamed(manifest.tree, "", f"{name}.")},
        manifest.files,
    )


def _holds_tensor(value: Tree) -> bool:
    if isinstance(value, dict):
        return is_tensor(value) or any(map(_holds_tensor, value.values()))
    return isinstance(value, list) and any(map(_holds_tensor, value))
