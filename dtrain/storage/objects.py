"""`ObjectStorage`: what run folders have in common that lie in a bucket.

There is no `link` there, nor a folder to sync: an object appears as a whole or not at all. To create one exclusively is
left to the server (on S3: a PUT with `If-None-Match: *`). Its answer may get lost, or a client's own second try may
find what the first one has made; so after every answer but a plain yes the object is read back. Who finds there what
it has written has won, whatever was answered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from dtrain.errors import ConfigError
from dtrain.storage.base import inside

_TRIES = 6
_BACK_OFF_S = 0.1
"""Before the second try; twice as long before each one after it, and anything between nothing and that."""

SILENT_S = 4.0
"""A server that hasn't answered by then is named: somebody may sit there and wonder."""


class ObjectStorage(ABC):
    """See `Storage`, whose other methods are those of a subclass.

    :param root: a URL.
    :param unsafe_commit: make do without exclusive creation.
    """

    read_bytes = 32 << 20
    reads_at_once = 8
    patience_s = 180.0
    """For how long something is tried again."""

    def __init__(self, root: str, *, unsafe_commit: bool = False) -> None:
        self.root = root.rstrip("/")
        self._unsafe = unsafe_commit
        self._opening = threading.Lock()
        self._told = 0.0

    def prepare(self) -> None:
        """See `Storage`.

        :raises ConfigError: it can't be written to, or can't create a file exclusively.
        :raises OSError: nobody answers, which may pass.
        """
        probe = f".probe.{uuid.uuid4().hex}"
        try:
            with self.silence_told():
                self._find(probe)
            self._create_or_find(probe, b"first")
            try:
                self._create_or_find(probe, b"second")
                refused = False
            except FileExistsError:
                refused = self.read(probe) == b"first"
            self._delete(probe)
        except (PermissionError, FileNotFoundError) as error:
            raise ConfigError(f"dir={self.root!r} can't be used: {error}") from error
        if refused or self._unsafe:
            return
        raise ConfigError(
            f"dir={self.root!r}: what is behind it has overwritten a file that was to be created only if it wasn't "
            "there (If-None-Match). dtrain commits by that: without it, two groups of processes that both take "
            "themselves for the run could undo each other's checkpoints. Use a server that has it, or, where never "
            "more than one group can be alive, unsafe_commit=True"
        )

    def create(self, path: str, data: bytes) -> None:
        if not self._unsafe:
            self._create_or_find(path, data)
            return
        if self._find(path) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.place(path))
        self._put(path, data)
        if self._find(path) != data:
            raise FileExistsError(errno.EEXIST, "overwritten by another writer", self.place(path))

    def seal(self, folder: str) -> None:
        """See `Storage`."""
        del folder  # an object that is there is durable, and so is its name

    def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
        views = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        if not views:
            return
        try:
            self._read_range(path, offset, views)
        except FileNotFoundError:
            raise
        except OSError:
            end = self._size(path)
            if offset + sum(view.nbytes for view in views) <= end:
                raise
            raise EOFError(f"{path} ends at byte {end}") from None

    def place(self, path: str) -> str:
        """For messages."""
        return f"{self.root}/{path}"

    @contextlib.contextmanager
    def silence_told(self) -> Iterator[None]:
        """Where the block takes long, say who doesn't answer: a client tries again for minutes, without a word."""
        until = time.time() + self.patience_s

        def tell() -> None:
            if time.time() > self._told:
                self._told = until
                sys.stderr.write(f"[dtrain] {self._silence(until)}\n")
                sys.stderr.flush()

        timer = threading.Timer(SILENT_S, tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _silence(self, until: float) -> str:
        """What to say of a server that doesn't answer. :param until: Unix time."""
        return f"{self.root}: no answer for {SILENT_S:.0f} s; it is still being waited for"

    @abstractmethod
    def read(self, path: str) -> bytes:
        """See `Storage`."""

    @abstractmethod
    def _put_new(self, path: str, data: bytes) -> None:
        """:raises FileExistsError: there is such a file, or somebody else makes one at this moment."""

    @abstractmethod
    def _put(self, path: str, data: bytes) -> None:
        """Write a file, whatever was there."""

    @abstractmethod
    def _read_range(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """:raises OSError: what came isn't all of it, because the file ends before, say."""

    @abstractmethod
    def _size(self, path: str) -> int:
        """Of a file, in bytes."""

    @abstractmethod
    def _delete(self, path: str) -> None:
        """Delete a file."""

    def _create_or_find(self, path: str, data: bytes) -> None:
        """:raises FileExistsError: somebody else's is there."""
        inside(path, self.root)
        deadline = time.monotonic() + self.patience_s
        for tried in range(_TRIES):
            try:
                self._put_new(path, data)
                return
            except (PermissionError, FileNotFoundError):  # there is no such bucket
                raise
            except OSError as error:
                failure = error
            try:
                found = self._find(path)
            except OSError:
                found = None
            if found == data:
                return
            if found is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.place(path))
            # It isn't there, or nobody knows. If it gets there late, the next try finds it.
            if time.monotonic() > deadline:
                break
            time.sleep(random.uniform(0, _BACK_OFF_S * 2**tried))
        raise OSError(f"{self.place(path)} could not be created: {failure}")

    def _find(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None
