"""Checkpoints written and committed by hand, without a run: for the tests of what reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import MANIFEST, Chunk, Manifest, hash_item
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.state import State
from dtrain.checkpoint.writer import Writer
from dtrain.storage.local import LocalStorage
from tests.saving import bits


def write(root: Path, step: int = 1, **objects: Any) -> Path:
    """Save and commit. All ranks must reach it. :returns: the checkpoint's folder, in the same place on each."""
    state = State()
    state.track(objects)
    return write_tree(root, state.tree({"step": step}), step)


def write_tree(root: Path, tree: Any, step: int = 1) -> Path:
    storage = LocalStorage(str(root))
    folder = f"{CHECKPOINTS}/step-{step:08d}.e1.0"
    writer = Writer(storage, folder, tree, step=step)
    dcp.save(
        writer.state_dict,
        storage_writer=writer,
        planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )
    if dist.get_rank() == 0:
        log = Log(storage)
        log.claim(0.0, "0")
        log.append(
            Entry(
                kind="commit",
                epoch=log.epoch,
                time=0.0,
                step=step,
                attempt=Path(folder).name,
                manifest=writer.manifest,
            )
        )
    dist.barrier()
    return root / folder


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_json((folder / MANIFEST).read_bytes())


def only_chunk(folder: Path, name: str) -> Chunk:
    (chunk,) = manifest_of(folder).tensors[name].chunks
    return chunk


def whole(tensor: torch.Tensor) -> bytes:
    """All bits of a tensor, gathered from the ranks. All must reach it."""
    return bits(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def held(tensor: torch.Tensor) -> int:
    """The bytes that this rank has of a tensor."""
    return local_part(tensor).nbytes


def in_blocks_of(size: int, folder: Path) -> Manifest:
    """A checkpoint's manifest as if its digests were of blocks of another size."""
    manifest = manifest_of(folder)
    files = {file: memoryview((folder / file).read_bytes()) for file in manifest.files}

    def again(chunk: Chunk) -> Chunk:
        item = files[chunk.file][chunk.offset : chunk.offset + chunk.length]
        return chunk._replace(digests=hash_item(item, size))

    tensors = {
        name: item._replace(chunks=[again(chunk) for chunk in item.chunks]) for name, item in manifest.tensors.items()
    }
    return replace(manifest, tensors=tensors, block_bytes=size)
