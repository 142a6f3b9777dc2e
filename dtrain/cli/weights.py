"""The tensors of a run's last checkpoint, and a digest of them: two runs that end alike have the same one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.reader import load_tensors, read_manifest
from dtrain.checkpoint.tree import dtype_name, dtype_named
from dtrain.errors import NoGoodCheckpoint
from dtrain.storage.places import storage_at


def last_tensors(run: str | os.PathLike[str]) -> tuple[int, dict[str, torch.Tensor]]:
    """The step of a run's newest commit, and all of its tensors by name, whole, and checked as they are read.

    :raises NoGoodCheckpoint: nothing has been committed.
    :raises Damaged: the newest commit isn't what was saved.
    """
    storage = storage_at(run)
    log = Log(storage)
    log.refresh()
    if not log.commits():
        raise NoGoodCheckpoint(f"{run} has no checkpoint")
    commit = log.commits()[-1]
    folder = f"{CHECKPOINTS}/{commit.attempt}"
    _, manifest = read_manifest(storage, folder, MANIFEST, commit.manifest)
    tensors = {
        name: torch.empty(item.shape, dtype=dtype_named(item.dtype)) for name, item in sorted(manifest.tensors.items())
    }
    load_tensors(storage, folder, manifest, tensors)
    return commit.step, tensors


def sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, types, shapes and bytes, in the order of the names: how a checkpoint was cut leaves no trace in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
