"""`compare`: what differs between two checkpoints, from their manifests alone: no shard file is read.

Two tensors are equal if all their digests are. Those cover the frame around a tensor's bytes too, which depends on type
and shape alone, and on the version of torch. So what was cut in another way, or saved by another torch, can't be told
from its digests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dtrain.checkpoint.format import Manifest, TensorItem, json_text
from dtrain.checkpoint.tree import encode, leaves_of


@dataclass(frozen=True)
class Difference:
    """Between two checkpoints, the old and the new one. Tensors and values by their names."""

    equal: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Old and new type and shape."""
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Of the same type and shape, but cut in another way."""
    values: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """Plain values that differ, old and new, as Python writes them; None where there is none. Of two that it
    writes alike, as it may arrays, the new one says that they aren't the same."""

    def __bool__(self) -> bool:
        return any((self.changed, self.reshaped, self.only_old, self.only_new, self.unknown, self.values))


def compare(old: Manifest, new: Manifest) -> Difference:
    found = Difference()
    same_frames = old.block_bytes == new.block_bytes and old.torch == new.torch
    for name in sorted(old.tensors.keys() | new.tensors.keys()):
        before, now = old.tensors.get(name), new.tensors.get(name)
        if before is None:
            found.only_new.append(name)
        elif now is None:
            found.only_old.append(name)
        elif (before.dtype, before.shape) != (now.dtype, now.shape):
            found.reshaped[name] = (described(before), described(now))
        elif _digests(before) == _digests(now):
            found.equal.append(name)
        elif same_frames and _digests(before).keys() == _digests(now).keys():
            found.changed.append(name)
        else:
            found.unknown.append(name)
    leaves = [_plain_leaves(manifest) for manifest in (old, new)]
    # By what is saved of them: what Python writes of an array may leave a difference out.
    values, others = ({name: json_text(encode(leaf)) for name, leaf in of_one.items()} for of_one in leaves)
    for name in sorted(values.keys() | others.keys()):
        if values.get(name) != others.get(name):
            was, is_now = (repr(of_one[name]) if name in of_one else None for of_one in leaves)
            found.values[name] = (was, f"{is_now}, not the same" if is_now == was else is_now)
    return found


def described(item: TensorItem) -> str:
    """A tensor's type and shape."""
    return f"{item.dtype} {'x'.join(map(str, item.shape)) or 'scalar'}"


def plain_values(manifest: Manifest) -> dict[str, str]:
    """Everything in a state that is no tensor, by dotted name, as Python writes it."""
    return {name: repr(leaf) for name, leaf in _plain_leaves(manifest).items()}


def _plain_leaves(manifest: Manifest) -> dict[str, Any]:
    return {name: leaf for name, (_, leaf) in leaves_of(manifest.tree).items() if not isinstance(leaf, torch.Tensor)}


def _digests(item: TensorItem) -> dict[tuple[tuple[int, ...], tuple[int, ...]], bytes]:
    return {(tuple(chunk.offsets), tuple(chunk.sizes)): chunk.digests for chunk in item.chunks}
