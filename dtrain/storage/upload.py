"""`Upload`: a file that goes to a bucket part by part while it is written, through a client that pulls the parts."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from dtrain.storage.base import Buffer


class Upload:
    """Takes what is written. What is more than one part goes to an upload in a thread of its own, part by part.

    :param begin: starts the upload of what an iterator gives.
    """

    def __init__(self, part_bytes: int, begin: Callable[[Iterator[Buffer]], Future[None]]) -> None:
        self.written = 0
        self.kept: list[Buffer] = []
        """All of it, if that is no more than one part."""
        self._part_bytes = part_bytes
        self._begin = begin
        self._upload: Future[None] | None = None
        self._queue: queue.Queue[Buffer | BaseException | None] = queue.Queue(1)

    def write(self, data: Buffer) -> None:
        self.written += memoryview(data).nbytes
        if self._upload is not None:
            self._hand_over(data)
            return
        self.kept.append(data)
        if self.written > self._part_bytes:
            self._upload = self._begin(self._parts())
            kept, self.kept = self.kept, []
            for part in kept:
                self._hand_over(part)

    def finish(self) -> bool:
        """Nothing more comes. :returns: whether there was an upload, which has succeeded now."""
        if self._upload is None:
            return False
        self._hand_over(None)
        self._upload.result()
        return True

    def give_up(self, error: BaseException) -> None:
        """Nothing more comes, and what there is is to be thrown away."""
        if self._upload is not None:
            with contextlib.suppress(OSError, GivenUp):
                self._hand_over(error)
                self._upload.result()

    def _hand_over(self, part: Buffer | BaseException | None) -> None:
        """:raises OSError: the upload has failed."""
        assert self._upload is not None
        while True:
            if self._upload.done():
                self._upload.result()
                raise OSError("the upload has ended early")
            with contextlib.suppress(queue.Full):
                self._queue.put(part, timeout=0.1)
                return

    def _parts(self) -> Iterator[Buffer]:
        while (part := self._queue.get()) is not None:
            if isinstance(part, BaseException):
                raise GivenUp from part
            yield part


class GivenUp(Exception):
    """An upload's writer has failed."""
