"""The index for stock DCP is what pickle would make of DCP's own objects, byte for byte another, object for object the
same."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dtrain.checkpoint.format import Part, json_text
from dtrain.checkpoint.index import dcp_index
from dtrain.errors import StateError

DTYPES = ["float32", "bfloat16", "int64", "bool", "complex64", "float8_e4m3fn"]
NAMES = ["model.weight", "ü.%s.%b%%", "\0hole\0", "\ud800", "a b\nc", "x" * 300, "Q", "state.\0007\0"]


def part(rank: int, items: list[Any]) -> Part:
    return Part(file=f"__{rank}_0.distcp", size=1, items=json_text(items), digests=b"")


def random_state(pick: random.Random) -> tuple[list[Part], dict[str, Any], dict[str, Any]]:
    """Parts, tree, and types and shapes, of tensors cut along their first dimension."""
    ranks = pick.randint(1, 5)
    shapes: dict[str, Any] = {}
    items: list[list[Any]] = [[] for _ in range(ranks)]
    tree: dict[str, Any] = {}
    for name in pick.sample(NAMES, pick.randint(0, len(NAMES))):
        shape = [pick.choice([0, 1, 2, 2**40]) for _ in range(pick.randint(0, 3))]
        shapes[name] = [pick.choice(DTYPES), shape]
        tree[name] = {"$tensor": name}
        owners = range(ranks) if shape and shape[0] else [pick.randrange(ranks)]
        step = -(-shape[0] // len(owners)) if shape else 0
        for rank in owners:
            low, high = (min(shape[0], rank * step), min(shape[0], (rank + 1) * step)) if len(owners) > 1 else (0, 0)
            offsets = [low, *(0 for _ in shape[1:])] if shape else []
            sizes = [high - low, *shape[1:]] if len(owners) > 1 else list(shape)
            items[rank].append([name, pick.choice([0, 7, 2**31, 2**45]), pick.choice([1, 2**33]), 64, offsets, sizes])
    for name in pick.sample(["plain", "%d", "lr"], pick.randint(0, 3)):
        tree[name] = 1.5
        items[0].append([name, 2**31 - 1, 9])
    return [part(rank, own) for rank, own in enumerate(items)], tree, shapes


def made_by_pickle(parts: list[Part], tree: dict[str, Any], shapes: dict[str, Any]) -> Metadata:
    entries: dict[str, Any] = {
        name: TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype)), torch.Size(shape), [])
        for name, (dtype, shape) in shapes.items()
    }
    places = {}
    for one in parts:
        for name, offset, length, *box in json.loads(one.items):
            where = _StorageInfo(one.file, offset, length)
            if box:
                entries[name].chunks.append(ChunkStorageMetadata(torch.Size(box[1]), torch.Size(box[2])))
                places[MetadataIndex(name, box[1])] = where
            else:
                entries[name] = BytesStorageMetadata()
                places[MetadataIndex(name)] = where
    found: Metadata = pickle.loads(
        pickle.dumps(
            Metadata(state_dict_metadata=entries, planner_data={name: (name,) for name in tree}, storage_data=places)
        )
    )
    return found


@pytest.mark.parametrize("seed", range(60))
def test_it_holds_what_pickle_would_have_put_there(seed: int) -> None:
    parts, tree, shapes = random_state(random.Random(seed))
    data = dcp_index(parts, json_text(tree), json_text(shapes))
    found, expected = pickle.loads(data), made_by_pickle(parts, tree, shapes)
    assert found == expected
    assert [vars(key) for key in found.storage_data] == [vars(key) for key in expected.storage_data]
    for name, entry in found.state_dict_metadata.items():
        assert vars(entry) == vars(expected.state_dict_metadata[name])
        for chunk in getattr(entry, "chunks", ()):
            assert type(chunk.offsets) is type(chunk.sizes) is torch.Size
    pickletools.dis(data, out=io.StringIO())  # it checks stack and memo on its way


def test_a_tensor_that_is_not_whole_is_refused() -> None:
    shapes = json_text({"a": ["float32", [4]]})
    tree = json_text({"a": {"$tensor": "a"}})
    half = [part(0, [["a", 0, 8, 0, [0], [2]]])]
    with pytest.raises(StateError, match="a: the ranks have saved 2 elements of a tensor of shape"):
        dcp_index(half, tree, shapes)
    with pytest.raises(StateError, match="a: the ranks have saved 0 elements"):
        dcp_index([], tree, shapes)
