"""`Source`: what can be read like a checkpoint, whoever has saved it. `sources.py` opens it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dtrain.checkpoint.format import Chunk, Manifest, Piece, TensorItem, hash_item
from dtrain.checkpoint.state import RUN
from dtrain.checkpoint.tree import Tree, dtype_named, renamed, tensor_names
from dtrain.errors import Damaged, StateError
from dtrain.storage.base import Storage, looks

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
