"""`Storage`: the few things that a checkpoint asks of the place where it is kept.

A place knows bytes and names; it knows neither tensors nor steps. Paths are relative to the run folder, with `/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview


class Sink(Protocol):
    """A new file that is being written."""

    def write(self, data: Buffer, /) -> object:
        """Append all of `data`, which must not change before the file is whole."""


class Readable(Protocol):
    """Where parts of files can be read."""

    def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, from `offset` on. Several threads may do so at once.

        :raises EOFError: the file ends before.
        """


@runtime_checkable
class KeepsOpen(Protocol):
    """Where opening a file costs something."""

    def keep_open(self) -> AbstractContextManager[None]:
        """In the block, a file that is read from stays open, so that many reads of it cost one opening. Of many files,
        a few do."""


@runtime_checkable
class Distant(Protocol):
    """Where a read waits for its answer for longer than for the bytes: it takes larger ones, and many at once."""

    read_bytes: int
    reads_at_once: int


def looks(storage: object) -> range:
    """How often to read what turns out not to be what was saved, before that is said of the place: what comes over a
    network may have been damaged on its way."""
    return range(2 if isinstance(storage, Distant) else 1)


class File(NamedTuple):
    """What is known of a file without opening it."""

    bytes: int
    changed: float
    """Unix time in seconds."""


@dataclass(frozen=True)
class HalfMade:
    """What a process that is gone was at work on, and nobody sees but whoever looks for it."""

    path: str
    bytes: int
    changed: float
    """Unix time in seconds."""
    remove: Callable[[], None]


class Storage(Readable, Protocol):
    """One run folder. What can't be reached raises an `OSError`."""

    root: str
    """Where it is, for messages."""

    def prepare(self) -> None:
        """Make the folder, and find out now, not at the first save, whether it can be used.

        :raises ConfigError: it can't.
        """

    def create(self, path: str, data: bytes) -> None:
        """Make a small file that holds all of `data`, durable when this returns, and never seen in part.

        :param data: different from what anybody else might put there.
        :raises FileExistsError: there is one of this name; of several that try at once, one alone succeeds.
        """

    def open_new(self, path: str, size: int = 0) -> AbstractContextManager[Sink]:
        """Write a large file that didn't exist before; durable when the block ends without an error.

        :param size: about how many bytes it will have, where that is known.
        """

    def read(self, path: str) -> bytes:
        """All bytes of a file. :raises FileNotFoundError:"""

    def files(self, folder: str) -> dict[str, File]:
        """The files right in a folder, by name; none if there is no such folder."""

    def names(self, folder: str, after: str = "") -> list[str]:
        """What lies in a folder, sorted, but for what begins with a dot; nothing if there is no such folder.

        :param after: only names that come behind this one.
        """

    def seal(self, folder: str) -> None:
        """Make the names of the files in `folder`, and its own, durable."""

    def remove(self, folder: str) -> None:
        """Delete a folder with all that is in it, as far as that can be done."""

    def half_made(self) -> Iterator[HalfMade]:
        """What killed processes have left, and what living ones are at work on: their age tells them apart."""


def inside(path: str, root: str) -> PurePosixPath:
    """A path, if it stays in the run folder: names also come from files that somebody else may have written.

    :raises ValueError: it leads out.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{path!r} leads out of the run folder {root}")
    return parts
