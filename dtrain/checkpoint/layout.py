"""`Layout`: how one rank's shard file is laid out, known before a byte of it is written.

A tensor lies in the file in the frame that `torch.save` puts around it, so that stock DCP can read it. The frame
depends on the tensor's type and shape alone. So it is made once, without the tensor's bytes, and those are copied into
their place in every save.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from dtrain.checkpoint.format import digest, json_text, tensors_to_json
from dtrain.checkpoint.tree import dtype_name

_SMALL_BYTES = 64 << 10
"""Boxes of less come first, by size: whoever needs just these, such as the step counts that an optimizer keeps for each
parameter, finds them in one place."""

ALIGN = 64
"""Tensors' bytes begin at a multiple of this, in the file and in memory, as in `torch.save`."""


@dataclass(frozen=True)
class Frame:
    """What stands before and behind a tensor's bytes."""

    head: bytes
    tail: bytes


@dataclass(frozen=True)
class Place:
    """Where a box of a tensor lies in the file."""

    name: str
    offset: int
    length: int
    frame: Frame
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        """Of the tensor's own bytes in the file."""
        return self.offset + len(self.frame.head)

    @property
    def stop(self) -> int:
        return self.offset + self.length - len(self.frame.tail)


class Layout:
    """See above.

    :param items: what this rank writes, as DCP plans it; tensors only.
    :ivar places: of the tensors, as they follow each other in the file.
    :ivar indices: DCP's names for them, in the same order.
    :ivar size: of the file, in bytes.
    :ivar items: JSON text of the manifest's items.
    :ivar tensors: JSON text of the types and whole shapes of the tensors that this rank writes a part of.
    :ivar digest: of all of it: two ranks or two saves with the same one are laid out alike.
    """

    def __init__(self, items: Iterable[WriteItem]) -> None:
        self.places: list[Place] = []
        self.indices: list[MetadataIndex] = []
        shapes: dict[str, tuple[str, Sequence[int]]] = {}
        boxes: list[tuple[int, WriteItem, TensorWriteData]] = []
        for item in items:
            data = item.tensor_data
            assert data is not None
            shapes[item.index.fqn] = (dtype_name(data.properties.dtype), tuple(data.size))
            boxes.append((data.properties.dtype.itemsize * math.prod(data.chunk.sizes), item, data))
        offset = 0
        for size, item, data in sorted(boxes, key=lambda box: min(box[0], _SMALL_BYTES)):
            dtype, sizes = data.properties.dtype, tuple(data.chunk.sizes)
            frame = frame_of(dtype, sizes)
            length = len(frame.head) + len(frame.tail) + size
            self.places.append(Place(item.index.fqn, offset, length, frame, dtype, tuple(data.chunk.offsets), sizes))
            self.indices.append(item.index)
            offset += length + -length % ALIGN
        self.size = offset
        self.items = json_text(
            [[p.name, p.offset, p.length, len(p.frame.head), list(p.offsets), list(p.sizes)] for p in self.places]
        )
        self.tensors = tensors_to_json(shapes)
        self.digest = digest(f"{self.size}{self.items}{self.tensors}".encode())

    def write_frames(self, memory: memoryview) -> None:
        """Write all that isn't a tensor's own bytes into memory of the file's size."""
        end = 0
        for place in self.places:
            memory[end : place.offset] = bytes(place.offset - end)
            memory[place.offset : place.start] = place.frame.head
            end = place.offset + place.length
            memory[place.stop : end] = place.frame.tail
        memory[end : self.size] = bytes(self.size - end)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Each place as a tensor of its own type and shape in memory of the file's size, given as bytes."""
        return [memory[p.start : p.stop].view(p.dtype).view(p.sizes) for p in self.places]

    def stream(self, tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]) -> Iterator[memoryview]:
        """The file's bytes, with the tensors' own as they are in memory, where they are contiguous and on the CPU."""
        end = 0
        for index, place in enumerate(self.places):
            tensor = tensors[place.name] if isinstance(tensors, Mapping) else tensors[index]
            yield memoryview(bytes(place.offset - end) + place.frame.head)
            yield bytes_of(plain(tensor))
            yield memoryview(place.frame.tail)
            end = place.offset + place.length
        yield memoryview(bytes(self.size - end))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """As it lies in a file: on the CPU, contiguous, and without what a view says beside its bytes."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    if tensor.numel() == 0:
        return memoryview(b"")
    # A contiguous tensor of one element may still have any stride.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


@lru_cache(maxsize=4096)
def frame_of(dtype: torch.dtype, sizes: tuple[int, ...]) -> Frame:
    """The frame that `torch.save` makes for a contiguous tensor, without the memory that the tensor would take."""
    file = Sparse()
    with torch.serialization.skip_data():
        torch.save(torch.empty(sizes, dtype=dtype), cast(IO[bytes], file))
    size = dtype.itemsize * torch.Size(sizes).numel()
    (record,) = (
        info for info in zipfile.ZipFile(cast(IO[bytes], file)).infolist() if info.filename.endswith("/data/0")
    )
    # The local header, which the zip directory points to: 30 bytes, of which the last four are the lengths of the
    # name and of the padding that follow (APPNOTE.TXT 4.3.7).
    file.seek(record.header_offset + 26)
    lengths = file.read(4)
    start = record.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    file.seek(0)
    head = file.read(start)
    file.seek(start + size)
    return Frame(head, file.read())


class Sparse(io.RawIOBase):
    """A file in memory whose holes take no room."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bytes]] = []
        self._at = 0
        self._end = 0

    def write(self, data: Any) -> int:
        part = bytes(data)
        self.written.append((self._at, part))
        self._at += len(part)
        self._end = max(self._end, self._at)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._end if size is None or size < 0 else min(self._end, self._at + size)
        found = bytearray(max(0, stop - self._at))
        for start, part in self.written:
            low, high = max(start, self._at), min(start + len(part), stop)
            if low < high:
                found[low - self._at : high - self._at] = part[low - start : high - start]
        self._at = max(self._at, stop)
        return bytes(found)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
