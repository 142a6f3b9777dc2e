"""Copying tensors into a slot: all that a snapshot costs the training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from dtrain.checkpoint.plan import owners

_COPY_BYTES = 64 << 20
"""A thread that copies less isn't worth its start."""


@torch.no_grad()
def copy(
    targets: list[torch.Tensor], sources: list[torch.Tensor], steady: list[bool], threads: int
) -> torch.cuda.Event | None:
    """Copy tensors into memory, which is pinned where they are on a GPU.

    :param steady: for each, whether nothing but the optimizer changes it.
    :param threads: at most so many copy at once.
    :returns: what to wait for, if it isn't done yet.
    """
    devices = {source.device for source in sources if source.is_cuda}
    if not devices:
        _copy_on_cpu(targets, sources, threads)
        return None
    (device,) = devices
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    for target, source, late in zip(targets, sources, steady, strict=True):
        # What the next forward pass changes, such as running means, is copied before it; all the rest beside it.
        with torch.cuda.stream(side if late and source.is_cuda else main):
            target.copy_(source, non_blocking=source.is_cuda)
            if late and source.is_cuda:
                source.record_stream(side)
    side.wait_stream(main)
    copied = torch.cuda.Event()
    copied.record(side)
    return copied


def _copy_on_cpu(targets: list[torch.Tensor], sources: list[torch.Tensor], threads: int) -> None:
    """One thread alone rarely has all of a machine's memory bandwidth."""
    count = min(threads, len(sources), sum(source.nbytes for source in sources) // _COPY_BYTES)
    if count <= 1:
        if sources:
            torch._foreach_copy_(targets, sources)
        return
    turn = owners({str(number): source for number, source in enumerate(sources)}, count)

    @torch.no_grad()  # every thread begins with gradients on
    def work(thread: int) -> None:
        mine = [number for number in range(len(sources)) if turn[str(number)] == thread]
        torch._foreach_copy_([targets[number] for number in mine], [sources[number] for number in mine])

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))  # a list, so that an error is raised


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
