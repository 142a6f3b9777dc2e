"""What the tests of stock torch's faults share. Each shows the fault, then that dtrain doesn't have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp

from dtrain.storage.base import Buffer, Sink
from dtrain.storage.local import LocalStorage


def still(happened: bool, fault: str) -> None:
    """Stock torch has a fault; a later one that hasn't is told here, and not by a test that shows nothing any more."""
    assert happened, f"torch {torch.__version__} no longer has this fault: {fault}. Delete stock's half of this test."


def stock_load(folder: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stock `dcp.load` puts into `tensors`, without a group."""
    dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def filled(value: float, size: int = 8192) -> torch.Tensor:
    """One dimension of `size` float32."""
    return torch.full((size,), value)


def at_byte(limit: int, act: Callable[[], None]) -> AbstractContextManager[object]:
    """While this holds, `act` is called instead of writing more than `limit` bytes to a shard file of dtrain's."""
    open_new = LocalStorage.open_new

    class Limited:
        def __init__(self, sink: Sink) -> None:
            self.sink = sink
            self.left = limit

        def write(self, data: Buffer) -> None:
            part = memoryview(data).cast("B")[: self.left]
            self.sink.write(part)
            self.left -= part.nbytes
            if part.nbytes < memoryview(data).nbytes:
                act()

    @contextmanager
    def hooked(storage: LocalStorage, path: str, size: int = 0) -> Iterator[Sink]:
        with open_new(storage, path, size) as sink:
            yield Limited(sink) if path.endswith(".distcp") else sink

    return mock.patch.object(LocalStorage, "open_new", hooked)
