"""Reading parts of a checkpoint: the blocks that hold what is wanted, several at once, each checked before it is used.

Whatever part of a tensor is wanted, the digest blocks that it lies in are read as a whole. What is wanted and lies in
one piece, in the file as in memory, is read straight into the tensor; all else goes through a few megabytes that each
thread keeps. What was read is hashed at once, while the processor's cache still holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import xxhash

from dtrain.checkpoint.boxes import Box, in_one_piece, index, parts
from dtrain.checkpoint.format import DIGEST_BYTES, Chunk
from dtrain.checkpoint.layout import bytes_of
from dtrain.errors import Damaged
from dtrain.storage.base import Distant, KeepsOpen, Readable, looks

_READ_BYTES = 4 << 20
"""Neighbouring blocks are read together up to this size, so that many small tensors cost one read."""

_HASH_BYTES = 1 << 20
"""A large block is read and hashed in such pieces: each is then still in the processor's own cache."""

_GAP_BYTES = 4096
"""Bytes between two blocks that are read and dropped rather than start another read: the disk reads pages anyway."""

_DIRECT_BYTES = 64 << 10
"""Less than this is cheaper to copy than to have a place of its own in a read."""

_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes, _memory_at.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE

_ALIGN = 16
"""No type's elements are larger."""

_MOST_THREADS = 8


class Want(NamedTuple):
    """A box of a chunk, and the memory that it is for."""

    name: str
    """Of the tensor, for messages."""
    chunk: Chunk
    dtype: torch.dtype
    """As it was saved."""
    start: Sequence[int]
    """The box's first element, counted from the chunk's."""
    target: torch.Tensor
    """Of the box's extent, in any memory and of any type."""


@dataclass(slots=True)
class _Block:
    """A range of a file that is read as a whole: a digest block, or a part of an item that has no digests."""

    file: str
    start: int
    stop: int
    name: str
    digest: bytes
    """Empty if nobody knows it."""
    first: int = 0
    """Of what is read straight into memory, in the file."""
    memory: memoryview | None = None
    """Where that goes."""
    box: Box | None = None


@dataclass(slots=True)
class _Read:
    """Neighbouring blocks of one file."""

    file: str
    start: int
    stop: int
    blocks: list[_Block] = field(default_factory=list)


def read_blocks(
    storage: Readable, folder: str, wants: Iterable[Want], block_bytes: int, threads: int | None = None
) -> int:
    """Fill the tensors. Takes no more memory than a block per thread, two for tensors on a GPU.

    :returns: how many bytes were read.
    :raises Damaged: a block doesn't hold what was saved, or can't be read. What the tensors hold then is worth nothing.
    """
    wants = sorted((w for w in wants if w.target.numel()), key=lambda w: (w.chunk.file, w.chunk.offset))
    devices = {want.target.device for want in wants if want.target.is_cuda}
    most, count = _READ_BYTES, threads or _processors()
    if isinstance(storage, Distant):
        most, count = storage.read_bytes, threads or storage.reads_at_once
    left = _reads((block for want in wants for block in _blocks(folder, want, block_bytes)), most)
    turn = threading.Lock()
    failures: list[BaseException] = []
    read_bytes = 0

    def next_read() -> _Read | None:
        nonlocal read_bytes
        with turn:  # one thread plans the next read, while the others are at theirs
            read = None if failures else next(left, None)
            if read is not None:
                read_bytes += read.stop - read.start
            return read

    def work() -> None:
        try:
            worker = _Worker(storage, folder, devices)
            while read := next_read():
                worker.read(read)
            worker.finish()
        except BaseException as error:
            failures.append(error)

    with storage.keep_open() if isinstance(storage, KeepsOpen) else contextlib.nullcontext():
        helpers = [threading.Thread(target=work, name="dtrain-read", daemon=True) for _ in range(count - 1)]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
    if failures:
        raise failures[0]
    return read_bytes


def _processors() -> int:
    """How many this rank has for itself, up to what is of use."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // max(1, ranks)))


def _blocks(folder: str, want: Want, block_bytes: int) -> Iterator[_Block]:
    """The blocks that hold a box."""
    name, chunk, dtype, start, target = want
    file, offset, length, digests, before, _, sizes = chunk
    payload, stop = offset + before, offset + length
    size, elements, count = dtype.itemsize, math.prod(sizes), target.numel()
    if before < 0 or payload + elements * size > stop:
        raise Damaged(f"{folder}/{file}: an item of {length} bytes is too short for {name}")
    flat = target.is_contiguous() and (count == elements or in_one_piece(sizes, target.shape))
    first = payload if count == elements else payload + size * index(sizes, start)
    last = first + size * count
    memory = box = None
    if flat and target.is_cpu and target.dtype == dtype and not target.is_conj() and not target.is_neg():
        memory = _memory_of(target)
    elif flat:  # in one piece on both sides: what the dimensions are doesn't matter
        box = Box((elements,), ((first - payload) // size,), target.view(-1), dtype, payload)
    else:
        box = Box(tuple(sizes), tuple(start), target, dtype, payload)
        end = [a + n - 1 for a, n in zip(start, target.shape, strict=True)]
        last = payload + size * (1 + index(sizes, end))
    # Blocks with digests are counted from the item's beginning; without any, just what is wanted is read.
    begin, stop = (offset, stop) if digests else (first, last)
    if box is not None and ((payload - begin) % size or block_bytes % size):
        raise Damaged(f"{folder}/{file}: the elements of {name} don't lie at multiples of their size")
    for number in range((first - begin) // block_bytes, -(-(last - begin) // block_bytes)):
        low = begin + number * block_bytes
        high = min(low + block_bytes, stop)
        digest = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        if memory is not None:
            into = max(low, first)
            yield _Block(file, low, high, name, digest, into, memory[into - first : high - first])
        elif box is not None and any(True for _ in parts(box, low, high)):
            yield _Block(file, low, high, name, digest, box=box)


def _memory_of(target: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, for as long as there is the tensor: at a fifth of what numpy's way takes."""
    memory: memoryview = _memory_at(target.data_ptr(), target.nbytes, _WRITABLE)
    return memory


def _reads(blocks: Iterable[_Block], most: int) -> Iterator[_Read]:
    """Neighbouring blocks together, up to so many bytes. They come as they lie in the files."""
    read: _Read | None = None
    for block in blocks:
        near = read is not None and read.file == block.file and read.stop <= block.start <= read.stop + _GAP_BYTES
        if read is None or not near or block.stop - read.start > most:
            if read is not None:
                yield read
            read = _Read(block.file, block.start, block.stop)
        read.stop = block.stop
        read.blocks.append(block)
    if read is not None:
        yield read


class _Worker:
    """One thread's part: its memory and, for tensors on a GPU, its streams."""

    def __init__(self, storage: Readable, folder: str, devices: set[torch.device]) -> None:
        self._storage = storage
        self._folder = folder
        self._looks = looks(storage)
        self._near = not isinstance(storage, Distant)
        self._pinned = bool(devices)
        # For a GPU two that take turns: the copies from one go on while the other is filled.
        self._spare = [torch.empty(0, dtype=torch.uint8) for _ in range(1 + bool(devices))]
        self._copied: list[list[torch.cuda.Event]] = [[] for _ in self._spare]
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def read(self, read: _Read) -> None:
        """Fill a read's part of the tensors."""
        place = f"{self._folder}/{read.file}"
        if self._near and len(read.blocks) == 1 and (memory := _whole(read.blocks[0])) is not None:
            self._read_whole(place, read.blocks[0], memory)
            return
        self._spare.reverse()
        self._copied.reverse()
        for event in self._copied[0]:
            event.synchronize()
        spare = self._memory_for(read)
        scratch = bytes_of(spare)
        buffers: list[memoryview] = []
        places: list[int] = []  # of the blocks in the scratch memory
        begun = used = 0  # the scratch memory between them follows the last of the buffers
        at = read.start
        for block in read.blocks:
            used += block.start - at
            if block.box is not None and used % _ALIGN:
                buffers.append(scratch[begun:used])
                begun = used = used + -used % _ALIGN
            places.append(used)
            if block.memory is not None and block.memory.nbytes >= _DIRECT_BYTES:
                used += block.first - block.start
                buffers += [scratch[begun:used], block.memory]
                begun = used
                used += block.stop - block.first - block.memory.nbytes
            else:
                used += block.stop - block.start
            at = block.stop
        buffers.append(scratch[begun:used])
        bad: _Block | None = None
        for _ in self._looks:
            with damaged_by(place):
                self._storage.read_into(place, read.start, buffers)
            pairs = zip(read.blocks, places, strict=True)
            bad = next((block for block, begin in pairs if not _is_good(block, scratch[begin:])), None)
            if bad is None:
                break
        if bad is not None:
            raise _damaged(place, bad)
        for block, begin in zip(read.blocks, places, strict=True):
            if block.memory is not None and block.memory.nbytes < _DIRECT_BYTES:
                block.memory[:] = scratch[begin + block.first - block.start :][: block.memory.nbytes]
            if block.box is not None:
                self._copy(block, block.box, spare[begin:])
        self._copied[0] = [stream.record_event() for stream in self._streams.values()]

    def _read_whole(self, place: str, block: _Block, memory: memoryview) -> None:
        hasher = xxhash.xxh3_128()
        for at in range(0, memory.nbytes, _HASH_BYTES):
            piece = memory[at : at + _HASH_BYTES]
            with damaged_by(place):
                self._storage.read_into(place, block.start + at, [piece])
            hasher.update(piece)
        if hasher.digest() != block.digest:
            raise _damaged(place, block)

    def _memory_for(self, read: _Read) -> torch.Tensor:
        """For all of a read, should none of it go straight into a tensor."""
        need = read.stop - read.start + _ALIGN * len(read.blocks)
        if self._spare[0].numel() < need:
            self._spare[0] = torch.empty(max(need, _READ_BYTES), dtype=torch.uint8, pin_memory=self._pinned)
        return self._spare[0]

    def finish(self) -> None:
        """Wait for the copies to a GPU."""
        for stream in self._streams.values():
            stream.synchronize()

    def _copy(self, block: _Block, box: Box, spare: torch.Tensor) -> None:
        """Copy what is wanted out of a block that was checked."""
        stream = self._streams.get(box.target.device)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for part in parts(box, block.start, block.stop):
                count = math.prod(part.sizes)
                begin = box.payload - block.start + part.first * box.dtype.itemsize
                saved = spare[begin : begin + count * box.dtype.itemsize].view(box.dtype).view(part.sizes)
                target = box.target
                for dim, (low, high, ours, start) in enumerate(zip(*part[2:], box.start, strict=True)):
                    saved = saved.narrow(dim, low - ours, high - low)
                    target = target.narrow(dim, low - start, high - low)
                target.copy_(saved, non_blocking=stream is not None)


def _whole(block: _Block) -> memoryview | None:
    """The memory that all of a block goes to, if there is one, and a digest for it, as there is none in memory."""
    memory = block.memory if block.digest else None
    return memory if memory is not None and memory.nbytes == block.stop - block.start >= _HASH_BYTES else None


def _damaged(place: str, block: _Block) -> Damaged:
    return Damaged(f"{place}: bytes {block.start} to {block.stop} are not those that were saved ({block.name})")


def _is_good(block: _Block, scratch: memoryview) -> bool:
    """Whether a block that was read is what was saved, as far as anybody knows.

    :param scratch: begins with what of it hasn't gone straight to its place.
    """
    memory, size = block.memory, block.stop - block.start
    if not block.digest:
        return True
    if memory is None or memory.nbytes < _DIRECT_BYTES:
        return xxhash.xxh3_128_digest(scratch[:size]) == block.digest
    head, tail = block.first - block.start, size - memory.nbytes
    hasher = xxhash.xxh3_128(scratch[:head])
    hasher.update(memory)
    hasher.update(scratch[head:tail])
    return hasher.digest() == block.digest


@contextlib.contextmanager
def damaged_by(place: str) -> Iterator[None]:
    """What can't be read because of what is in the place, not because of the way to it, counts as damaged."""
    try:
        yield
    except (EOFError, ValueError) as error:
        raise Damaged(f"{place}: {error}") from error
    except OSError as error:
        if not is_damage(error):
            raise
        raise Damaged(f"{place}: {error}") from error


def is_damage(error: OSError) -> bool:
    """Whether it tells of what is in a place, and not of the way to it."""
    return error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO)
