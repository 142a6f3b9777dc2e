"""Ranks of a process group, forked from the test: each is a real process with gloo between them."""

from __future__ import annotations

import io
import os
import pickle
import select
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dtrain.elastic.process import Child, fork

T = TypeVar("T")

torch.set_num_threads(1)  # a pool of threads in the parent would not be there in a fork


class Raised(Exception):
    """What a rank raised, with its traceback as text, since the traceback itself can't leave the process."""

    def __init__(self, error: BaseException, trace: str) -> None:
        super().__init__(error, trace)
        self.error = error
        self.trace = trace

    def __str__(self) -> str:
        return self.trace


def outcomes(world: int, work: Callable[[int], Any], timeout_s: float = 60.0) -> list[Any]:
    """What `work(rank)` returned on each rank, or a `Raised`, or a text such as "ended with -9"."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        children: list[Child] = []
        ends: list[int] = []
        for rank in range(world):
            end, start = os.pipe()
            children.append(fork(partial(_rank, rank, world, folder, work, start, timeout_s)))
            stack.callback(children[-1].kill)
            stack.callback(os.close, end)
            os.close(start)
            ends.append(end)
        said = _read_all(ends, timeout_s)
        return [
            torch.load(io.BytesIO(data), weights_only=False) if data else f"ended with {child.kill()}"
            for data, child in zip(said, children, strict=True)
        ]


def in_world(world: int, work: Callable[[int], T], timeout_s: float = 60.0) -> list[T]:
    """What `work(rank)` returned on each rank. :raises Raised: one of them failed."""
    results = outcomes(world, work, timeout_s)
    for result in results:
        if isinstance(result, Raised):
            raise result
    return results


def alone(work: Callable[[], T], timeout_s: float = 60.0) -> T:
    """What `work` returned in a process of its own, which is the only rank of a group."""
    return in_world(1, lambda rank: work(), timeout_s)[0]


def errors(world: int, work: Callable[[int], object], timeout_s: float = 60.0) -> list[BaseException]:
    """What `work(rank)` raised on each rank."""
    found = outcomes(world, work, timeout_s)
    assert all(isinstance(result, Raised) for result in found), found
    return [result.error for result in found]


def _rank(rank: int, world: int, folder: str, work: Callable[[int], object], start: int, timeout_s: float) -> int:
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    try:
        data = _dumped(work(rank))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            data = _dumped(Raised(error.with_traceback(None), trace))
        except pickle.PicklingError:  # pytest's own
            data = _dumped(Raised(AssertionError(str(error)), trace))
    with os.fdopen(start, "wb") as file:
        file.write(data)
    return 0


def _dumped(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)  # plain pickle doesn't know all types of tensors
    return stream.getvalue()


def _read_all(ends: list[int], timeout_s: float) -> list[bytes]:
    """What comes out of each pipe up to its end."""
    data = dict.fromkeys(ends, b"")
    left = set(ends)
    deadline = time.monotonic() + timeout_s
    while left:
        ready, _, _ = select.select(list(left), [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[ends.index(end) for end in left]} did not end within {timeout_s} s"
        for end in ready:
            part = os.read(end, 1 << 20)
            data[end] += part
            if not part:
                left.discard(end)
    return [data[end] for end in ends]
