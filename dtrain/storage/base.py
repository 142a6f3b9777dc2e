"""`Storage`: the few things that a checkpoint asks of the place where it is kept.

A place knows bytes and names; it knows neither tensors nor steps. Paths are relative to the run folder, with `/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview


class Sink(Protocol):
    """A new file that is being written."""

    def write(self, data: Buffer, /) -> object:
        """Append all of `data`."""


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
        """In the block, a file that is read from stays open, so that many reads of it cost one opening."""


class Storage(Readable, Protocol):
    """One run folder."""

    root: str
    """Where it is, for messages."""

    def create(self, path: str, data: bytes) -> None:
        """Make a file that holds all of `data`, durable when this returns, and never seen in part.

        :raises FileExistsError: there is one of this name; of several that try at once, one alone succeeds.
        """

    def open_new(self, path: str) -> AbstractContextManager[Sink]:
        """Write a large file that didn't exist before; durable when the block ends without an error."""

    def read(self, path: str) -> bytes:
        """All bytes of a file. :raises FileNotFoundError:"""

    def size(self, path: str) -> int:
        """In bytes. :raises FileNotFoundError:"""

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, sorted; nothing if there is no such folder."""

    def seal(self, folder: str) -> None:
        """Make the names of the files in `folder`, and its own, durable."""

    def remove(self, folder: str) -> None:
        """Delete a folder with all that is in it; nothing happens if it isn't there."""
