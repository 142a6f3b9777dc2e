"""A run folder on a local disk, or on a shared one that has hard links (NFS, Lustre, ...).

Exclusive creation is `link`: it fails where `rename` would overwrite, and a file appears under its name only when
all of it is on the disk. After an fsync that failed nothing is tried again on that file: the kernel has dropped the
pages, and a second fsync would report success.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.storage.base import Buffer, File, HalfMade, Sink, inside

_MOST_BUFFERS = 1024
"""The kernel's limit on the buffers of one `preadv` (IOV_MAX)."""

_MOST_OPEN = 16
"""Files that stay open while nobody reads from them. Reads come file by file, so more would hardly save an opening."""

_DIRECT_BYTES = 1 << 20
"""Less than this isn't worth a way of its own to the disk."""

_PAGE = mmap.PAGESIZE


class LocalStorage:
    """See `Storage`. :raises ConfigError: the folder can't be created or written to."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._keepers = 0
        self._open: dict[str, _Open] = {}
        """The last is the one that was asked for last."""

    def prepare(self) -> None:
        """See `Storage`. :raises ConfigError: the folder can't be written to, or has no hard links."""
        probe = Path(self.root) / f".probe.{uuid.uuid4().hex}.half"
        try:
            _make_folder(probe.parent)
            probe.touch()
            os.link(probe, linked := probe.with_suffix(".link.half"))
            linked.unlink()
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK) and probe.exists():
                raise ConfigError(
                    f"{self.root} is on a file system without hard links, by which dtrain commits; use another disk"
                ) from error
            raise ConfigError(
                f"{self.root} can't be written to ({error.strerror}); choose another folder or mend its permissions"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # it would hide the error above
                probe.unlink()

    def create(self, path: str, data: bytes) -> None:
        target = self._path(path)
        _make_folder(target.parent)
        half = target.with_name(f".{target.name}.{uuid.uuid4().hex}.half")
        try:
            with half.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(half, target)
            except FileExistsError:
                # A network file system may carry out a link, lose the reply and answer its own second try.
                if half.stat().st_nlink != 2:
                    raise
        finally:
            half.unlink(missing_ok=True)
        sync_folder(target.parent)

    @contextlib.contextmanager
    def open_new(self, path: str, size: int = 0) -> Iterator[Sink]:
        target = self._path(path)
        _make_folder(target.parent)
        with target.open("xb", buffering=0) as file:
            yield _Whole(file.fileno())
            os.fsync(file.fileno())

    def read(self, path: str) -> bytes:
        return self._path(path).read_bytes()

    def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
        left = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        with self._descriptor(path) as descriptor:
            while left:
                got = os.preadv(descriptor, left[:_MOST_BUFFERS], offset)
                if got == 0:
                    raise EOFError(f"{path} ends at byte {offset}")
                offset += got
                while left and got >= left[0].nbytes:
                    got -= left.pop(0).nbytes
                if got:
                    left[0] = left[0][got:]

    @contextlib.contextmanager
    def keep_open(self) -> Iterator[None]:
        with self._lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._lock:
                self._keepers -= 1
                self._close_unused()

    @contextlib.contextmanager
    def _descriptor(self, path: str) -> Iterator[int]:
        with self._lock:
            file = self._open.pop(path, None) or _Open(os.open(self._path(path), os.O_RDONLY))
            self._open[path] = file
            file.readers += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1
                self._close_unused()

    def _close_unused(self) -> None:
        """Of the files that nobody reads from, as many as are too many."""
        if (many := len(self._open) - (_MOST_OPEN if self._keepers else 0)) > 0:
            for path in [path for path, file in self._open.items() if not file.readers][:many]:
                os.close(self._open.pop(path).descriptor)

    def files(self, folder: str) -> dict[str, File]:
        try:
            with os.scandir(self._path(folder)) as entries:
                found = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}
        return {name: File(stat.st_size, stat.st_mtime) for name, stat in sorted(found.items())}

    def names(self, folder: str, after: str = "") -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._path(folder)) if name > after and not name.startswith("."))
        except FileNotFoundError:
            return []

    def seal(self, folder: str) -> None:
        path = self._path(folder)
        sync_folder(path)
        sync_folder(path.parent)

    def remove(self, folder: str) -> None:
        shutil.rmtree(self._path(folder), ignore_errors=True)

    def half_made(self) -> Iterator[HalfMade]:
        for half in sorted([*Path(self.root).glob(".*.half"), *Path(self.root).glob("*/.*.half")]):
            with contextlib.suppress(FileNotFoundError):  # it is whole now
                if half.is_dir():  # of an export
                    remove = functools.partial(shutil.rmtree, half, ignore_errors=True)
                else:
                    remove = functools.partial(half.unlink, missing_ok=True)
                stats = [part.stat() for part in (half, *half.rglob("*")) if part == half or part.is_file()]
                nbytes = sum(stat.st_size for stat in stats)
                yield HalfMade(str(half.relative_to(self.root)), nbytes, max(s.st_mtime for s in stats), remove)

    def _path(self, path: str) -> Path:
        return Path(self.root) / inside(path, self.root)


@dataclass(slots=True)
class _Open:
    """A file that is read from."""

    descriptor: int
    readers: int = 0


class _Whole:
    """`write` may take less than it is given; this takes all or raises.

    Large parts go past the page cache (O_DIRECT), from the caller's memory to the disk. To copy them into the cache
    would take the processors away from a training that needs them all. Where a file system or a buffer's place in
    memory doesn't allow it, they are copied.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._written = 0
        self._direct = False
        self._refused = False

    def write(self, data: Buffer) -> None:
        left = memoryview(data).cast("B")
        while left:
            part = left
            if left.nbytes >= _DIRECT_BYTES and self._written % _PAGE == 0 and self._pass_by(True):
                part = left[: left.nbytes // _PAGE * _PAGE]
            else:
                self._pass_by(False)
            try:
                taken = os.write(self._descriptor, part)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._refused = True
                continue
            left = left[taken:]
            self._written += taken

    def _pass_by(self, direct: bool) -> bool:
        """Have what comes next go past the page cache, or not. :returns: whether it will."""
        direct = direct and not self._refused
        if direct != self._direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags ^ os.O_DIRECT)
                self._direct = direct
            except OSError:
                self._refused = True
        return self._direct


def _make_folder(folder: Path) -> None:
    """With those above it, all of them durable: a file in a folder that is lost is lost as well."""
    if not folder.is_dir():
        if not folder.parent.exists():
            _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
