"""`adopt`: somebody else's weights as the first checkpoint of a new run folder.

Whatever `open_source` opens becomes a checkpoint of step 0 with digests, which any number of ranks can read by ranges.
It streams, as an export does.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.catalog import CHECKPOINTS, CONFIG
from dtrain.checkpoint.format import BLOCK_BYTES, BlockHasher, Part, TensorItem, json_text
from dtrain.checkpoint.index import Indexes
from dtrain.checkpoint.interchange import Progress, pwrite, room_at
from dtrain.checkpoint.layout import Layout, Place
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.plan import local_items
from dtrain.checkpoint.source import Source
from dtrain.checkpoint.state import RUN, State
from dtrain.checkpoint.tree import decode, dtype_named, renamed
from dtrain.checkpoint.writer import pickled, shard_name, with_values
from dtrain.errors import ConfigError, StateError, UsageError
from dtrain.storage.base import Sink, Storage
from dtrain.storage.places import storage_at


def adopt(
    source: Source,
    run: str | os.PathLike[str],
    *,
    name: str = "model",
    key: str = "",
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress = lambda done: None,
) -> str:
    """Make a run folder whose only checkpoint, of step 0, is somebody else's weights.

    :param run: the folder: a new one, or one without any checkpoint.
    :param name: that a run tracks its model by.
    :param key: where in the source the weights are, as dotted names; by default where its own `name` is.
    :param storage_options: how the run folder is reached where it is a URL.
    :returns: the checkpoint's folder.
    :raises ConfigError: the run folder has checkpoints already, or a run has begun there; or no run can track anything
        by that name.
    :raises StateError: the source has nothing under that key, or no object's state, or what only running code could
        read.
    """
    _check_name(name)
    key = key or name
    items, tree = source.select(key)
    if not isinstance(decode(tree, lambda _: torch.empty(0)), dict):
        raise StateError(f"{source.place}: {key} is not the state of an object; name the dict that the weights lie in")
    storage = storage_at(run, storage_options)
    storage.prepare()
    log = Log(storage)
    log.refresh()
    if any(entry.kind != "claim" for entry in log.entries) or log.broken:
        raise ConfigError(f"{run} has checkpoints already; give a new folder")
    if CONFIG in storage.names("."):  # to take a living run over would cost it all its steps
        raise ConfigError(f"{run} has a {CONFIG}: a run has begun there, and may be alive; give a new folder")
    nonce = uuid.uuid4().hex[:8]
    with room_at(run):
        claim = log.claim(time.time(), nonce, after=log.epoch)
        attempt = f"step-{0:08d}.e{claim.epoch}.{nonce}"
        folder = f"{CHECKPOINTS}/{attempt}"
        try:
            # The run's own part says that nothing has been trained yet.
            begun = {RUN: {"step": 0, "samples": 0, "config": {}, "data": {}}}
            text = json_text(begun | {name: renamed(tree, "", f"{name}.")})
            tensors = {f"{name}.{inner}": item for inner, item in items.items()}
            manifest, size = _write(storage, folder, text, tensors, source, progress)
        except BaseException:
            storage.remove(folder)  # `gc` leaves what is of the newest epoch alone
            raise
        log.append(
            Entry(
                kind="commit",
                epoch=claim.epoch,
                time=time.time(),
                nonce=nonce,
                attempt=attempt,
                manifest=manifest,
                bytes=size,
                world_size=1,
            )
        )
    return folder


def _check_name(name: str) -> None:
    """:raises ConfigError: no run can track anything by this name."""
    if not name:
        raise ConfigError("the weights need the name that a run tracks them by, such as 'model'; give one")
    try:
        State().track({name: nn.Module()})
    except UsageError as error:
        raise ConfigError(f"a run tracks nothing by the name {name!r}: {error}") from error


def _write(
    storage: Storage, folder: str, tree: str, tensors: Mapping[str, TensorItem], source: Source, progress: Progress
) -> tuple[str, int]:
    """Write a checkpoint. :returns: the digest of its manifest, and the size of all its files."""
    meta = {k: torch.empty(item.shape, dtype=dtype_named(item.dtype), device="meta") for k, item in tensors.items()}
    layout = Layout(local_items(meta, 0, 1))
    with storage.open_new(f"{folder}/{shard_name(0)}", layout.size) as sink:
        digests, end = [], 0
        for place in layout.places:
            digests.append(_write_item(sink, place, place.offset - end, tensors[place.name], source, progress))
            end = place.offset + place.length
        sink.write(bytes(layout.size - end))
        part = Part(file=shard_name(0), size=layout.size, items=layout.items, digests=b"".join(digests))
        part = with_values(part, pickled(tree), sink)
    indexes = Indexes()
    manifest = indexes.write(storage, folder, [part], step=0, world_size=1, tree=tree, tensors=[layout.tensors])
    return manifest, part.size + indexes.bytes


def _write_item(sink: Sink, place: Place, gap: int, item: TensorItem, source: Source, progress: Progress) -> bytes:
    """Append a tensor to a shard file, in its frame and after `gap` bytes of zeros. :returns: its digests."""
    hasher = BlockHasher()
    sink.write(bytes(gap))
    for data in _framed(place, item, source):
        hasher.update(data)
        sink.write(bytes(data))  # the next block comes into the same memory, and a bucket takes what is written later
        progress(data.nbytes)
    return hasher.digests()


def _framed(place: Place, item: TensorItem, source: Source) -> Iterator[memoryview]:
    yield memoryview(place.frame.head)
    yield from _in_order(item, source)
    yield memoryview(place.frame.tail)


def _in_order(item: TensorItem, source: Source) -> Iterator[memoryview]:
    """A tensor's bytes from first to last.

    A tensor that is cut so that its boxes don't lie one behind the other is put together in a file without a name.
    """
    boxes = sorted(item.chunks, key=lambda chunk: chunk.offsets)
    if all(chunk.sizes[1:] == item.shape[1:] for chunk in boxes):
        for chunk in boxes:
            yield from (data for _, data in source.payload(item, chunk))
        return
    with room_at(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        for chunk in boxes:
            for where, data in source.in_tensor(item, chunk):
                pwrite(file.fileno(), data, where)
        file.seek(0)
        while block := file.read(BLOCK_BYTES):
            yield memoryview(block)
