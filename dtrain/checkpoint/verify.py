"""`verify`: reads every byte of a checkpoint and names each that isn't as it was saved; the log's entries as well.

An item is compared with its digests block by block, so a fault is known to 4 MiB. Between the items there are only
zeros. The index `.metadata` and the manifest have digests of their own, the latter in the log.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from dtrain.checkpoint.blocks import is_damage
from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import DIGEST_BYTES, MANIFEST, METADATA, Chunk, Manifest, Piece, digest
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.errors import Damaged
from dtrain.storage.base import Distant, Storage, looks

_READ_BYTES = 4 << 20
_MOST_THREADS = 8


@dataclass(frozen=True, order=True)
class Fault:
    """Something that isn't as it was saved."""

    file: str
    """Below the run folder."""
    start: int
    """The first byte that may be wrong. With `stop` equal to it, the fault is of the file as a whole."""
    stop: int
    name: str
    """Of the tensor, or of the value whose copy for stock DCP it is; empty where it is neither."""
    what: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be said of one checkpoint."""

    faults: list[Fault]
    bytes: int
    """That were read."""
    seconds: float
    deleted: bool
    """The run has deleted it in the meantime; that is no fault."""


def verify_log(storage: Storage, log: Log) -> list[Fault]:
    """Faults of the log's own files. An entry has to be, byte for byte, what is written of what it says."""
    faults = []
    for broken in log.broken:
        file, _, reason = broken.partition(": ")
        faults.append(Fault(file, 0, 0, "", reason))
    for number, entry in enumerate(log.entries):
        file = f"{FOLDER}/{entry.number:08d}.json"
        data = storage.read(file)
        if json.dumps(json.loads(data), indent=1).encode() != data:
            faults.append(Fault(file, 0, len(data), "", "not as it was written"))
        before = log.entries[number - 1].number if number else -1
        for missing in range(before + 1, entry.number):
            name = f"{FOLDER}/{missing:08d}.json"
            if not any(fault.file == name for fault in faults):
                faults.append(Fault(name, 0, 0, "", "missing"))
    return sorted(faults)


def verify(storage: Storage, log: Log, commit: Entry, progress: Callable[[int], object] = lambda done: None) -> Verdict:
    """Read a checkpoint to its last byte.

    :raises OSError: it can't be reached.

    :param log: is read again at the end, to tell a damaged checkpoint from one that was just deleted.
    :param progress: called with the number of bytes that were read since the last time.
    """
    started = time.monotonic()
    folder = f"{CHECKPOINTS}/{commit.attempt}"
    done: list[int] = []
    faults = list(_faults(storage, folder, commit, done, progress))
    log.refresh()
    deleted = bool(faults) and any(e.kind == "retire" and e.attempt == commit.attempt for e in log.entries)
    return Verdict(
        faults=[] if deleted else _joined(sorted(faults)),
        bytes=sum(done),
        seconds=time.monotonic() - started,
        deleted=deleted,
    )


def size_of(storage: Storage, commit: Entry) -> int:
    """How many bytes there are to read, for a progress bar; 0 if the manifest can't tell."""
    try:
        data = storage.read(f"{CHECKPOINTS}/{commit.attempt}/{MANIFEST}")
        return sum(Manifest.from_json(data).files.values()) + len(data)
    except (OSError, Damaged):
        return 0


def _faults(
    storage: Storage, folder: str, commit: Entry, done: list[int], progress: Callable[[int], object]
) -> Iterator[Fault]:
    def read(file: str, expected: str, what: str) -> tuple[bytes, list[Fault]]:
        """A file that has one digest, and what is the matter with it."""
        data = b""
        for _ in looks(storage):
            try:
                data = storage.read(f"{folder}/{file}")
            except OSError as error:
                if not is_damage(error):
                    raise
                return b"", [Fault(f"{folder}/{file}", 0, 0, "", _reason(error))]
            if digest(data) == expected:
                break
        done.append(len(data))
        progress(len(data))
        wrong = digest(data) != expected
        return data, [Fault(f"{folder}/{file}", 0, len(data), "", what)] if wrong else []

    data, faults = read(MANIFEST, commit.manifest, "not the one that was committed")
    yield from faults
    if faults:
        return  # what it tells of the other files can't be trusted, so they can't be checked
    manifest = Manifest.from_json(data)
    yield from read(METADATA, manifest.metadata, "not what was saved")[1]
    there = storage.files(folder)
    items = _items(manifest)
    reads: list[_Read] = []
    for file, size in manifest.files.items():
        if file == METADATA:
            continue
        if file not in there:
            yield Fault(f"{folder}/{file}", 0, 0, "", "missing")
            continue
        found = there[file].bytes
        if found != size:
            yield Fault(f"{folder}/{file}", min(found, size), max(found, size), "", f"{found} bytes long, not {size}")
        reads += _reads(items[file], file, min(found, size), manifest.block_bytes)
    memory = threading.local()

    def check(read: _Read) -> list[Fault]:
        if not hasattr(memory, "view"):
            memory.view = memoryview(bytearray(max(_READ_BYTES, manifest.block_bytes)))
        place = f"{folder}/{read.file}"
        view = memory.view[: read.ranges[-1].stop - read.ranges[0].start]
        wrong: list[_Range] = []
        for _ in looks(storage):
            try:
                storage.read_into(place, read.ranges[0].start, [view])
            except (OSError, EOFError) as error:
                if isinstance(error, OSError) and not is_damage(error):
                    raise  # nobody answers, say: that is no fault of what was saved
                return [Fault(place, part.start, part.stop, part.name, _reason(error)) for part in read.ranges]
            begin = read.ranges[0].start
            wrong = [part for part in read.ranges if not part.is_good(view[part.start - begin : part.stop - begin])]
            if not wrong:
                break
        done.append(view.nbytes)
        progress(view.nbytes)
        return [Fault(place, part.start, part.stop, part.name, part.what) for part in wrong]

    most = storage.reads_at_once if isinstance(storage, Distant) else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(_MOST_THREADS, most)) as pool:
        for found_faults in pool.map(check, reads):
            yield from found_faults


class _Range(NamedTuple):
    """A part of a file that is right or wrong as a whole."""

    start: int
    stop: int
    name: str
    digest: bytes
    """Empty for what lies between items, which is zeros."""

    @property
    def what(self) -> str:
        return "not what was saved" if self.digest else "not zero, between two items"

    def is_good(self, data: memoryview) -> bool:
        return xxhash.xxh3_128_digest(data) == self.digest if self.digest else not any(data)


class _Read(NamedTuple):
    """Ranges one behind the other."""

    file: str
    ranges: list[_Range]


def _items(manifest: Manifest) -> dict[str, list[tuple[str, Piece | Chunk]]]:
    """What lies in each file, with its name."""
    items: dict[str, list[tuple[str, Piece | Chunk]]] = {file: [] for file in manifest.files}
    for name, piece in manifest.values.items():
        items[piece.file].append((name, piece))
    for name, item in manifest.tensors.items():
        for chunk in item.chunks:
            items[chunk.file].append((name, chunk))
    return items


def _reads(items: list[tuple[str, Piece | Chunk]], file: str, size: int, block_bytes: int) -> Iterator[_Read]:
    """All of a file."""
    ranges: list[_Range] = []
    end = 0
    for name, item in sorted(items, key=lambda pair: pair[1].offset):
        if end < item.offset:
            ranges.append(_Range(end, item.offset, "", b""))
        end = item.offset + item.length
        for number, start in enumerate(range(item.offset, end, block_bytes)):
            stop = min(end, start + block_bytes)
            ranges.append(_Range(start, stop, name, item.digests[number * DIGEST_BYTES :][:DIGEST_BYTES]))
    ranges += [_Range(start, min(size, start + _READ_BYTES), "", b"") for start in range(end, size, _READ_BYTES)]
    batch: list[_Range] = []
    for part in ranges:
        if batch and part.stop - batch[0].start > _READ_BYTES:
            yield _Read(file, batch)
            batch = []
        batch.append(part)
    if batch:
        yield _Read(file, batch)


def _joined(faults: list[Fault]) -> list[Fault]:
    """Faults that follow on each other in the same tensor, as one."""
    joined: list[Fault] = []
    for fault in faults:
        last = joined[-1] if joined else None
        if last and (last.file, last.stop, last.name, last.what) == (fault.file, fault.start, fault.name, fault.what):
            joined[-1] = Fault(fault.file, last.start, fault.stop, fault.name, fault.what)
        else:
            joined.append(fault)
    return joined


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return "ends too early" if isinstance(error, EOFError) else str(getattr(error, "strerror", "") or error)
