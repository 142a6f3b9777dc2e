"""The few numbers that the ranks add up in every step: count, loss, whether to stop, whether to save, their own times.

A message of its own would cost them a millisecond on busy CPU cores, more than everything else that dtrain adds to a
step. So they ride along with gradients: the communication hook appends them to the first bucket that leaves, which has
at most a megabyte. They are float32 like the gradients, so the count travels in digits, whose sums are exact. Where
no bucket can take them (GPUs, whose results are looked at later, and gradients of other types) they go alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BITS = 10
"""Of a digit of the count. A float32 adds up 2^14 = 16,384 ranks' digits exactly."""
_DIGITS = 4
MOST = 1 << _BITS * _DIGITS
"""A rank's count in a step is less than this."""


_REMEMBERED = 1024
"""Steps."""


@dataclass(frozen=True)
class Totals:
    """The sums over all ranks."""

    count: int
    loss: float
    stop: bool
    """The loop is to end, as somebody's code has asked for it."""
    end: bool
    """The process is to end, after a checkpoint."""
    action: int
    """What rank 0 wants done after the step: see `schedule`."""
    own_s: tuple[float, ...]
    """How long each rank was at work by itself since the step before: see `slow`."""
    orders: tuple[int, ...]
    """Of each rank: see `Wrapped.order`."""


class Exchange:
    """One for a run: it is used by one step after the other."""

    def __init__(self) -> None:
        self._numbers = torch.zeros(0)
        self._waiting = False
        self._work: dist.Work | None = None
        self._level = time.monotonic()
        self.looks = False
        """Whether this rank's own gradients are looked at, before they are added to those of the others."""
        self._sums: list[torch.Tensor] = []
        self._step = 0
        self._marks: dict[int, torch.Tensor] = {}

    def begin(self, step: int) -> None:
        """A step begins, perhaps for the second time."""
        self._sums.clear()
        self._step = step
        for old in (step, step - _REMEMBERED):
            self._marks.pop(old, None)

    def look(self, gradients: torch.Tensor) -> None:
        """Remember of gradients of this rank whether they are finite, and what tells them from any others."""
        if self.looks:
            self._sums.append(gradients.sum(dtype=torch.float32))  # it isn't finite if one of them isn't
            before = self._marks.get(self._step)
            mark = _mark(gradients)
            self._marks[self._step] = mark if before is None else before * 31 + mark

    @property
    def bad(self) -> bool:
        """Whether a gradient of this rank wasn't finite in this step, as far as they were looked at."""
        return any(not math.isfinite(found) for found in map(float, self._sums))

    def marks(self) -> dict[int, int]:
        """Of the last steps: what tells this rank's own gradients from any others, as far as they were looked at."""
        return {step: int(mark) for step, mark in self._marks.items()}

    def send(self, count: int, loss: float, *, stop: bool, end: bool, action: int, order: int = 0) -> None:
        """Have this rank's numbers ready for the backward pass that follows. All ranks must reach this.

        :param action: on rank 0, what to do after the step; 0 on the others.
        :param order: less than 2^24.
        """
        ranks, rank = dist.get_world_size(), dist.get_rank()
        of_ranks = [0.0] * (2 * ranks)
        of_ranks[rank], of_ranks[ranks + rank] = time.monotonic() - self._level, order
        digits = [float(count >> (_BITS * place) & ((1 << _BITS) - 1)) for place in range(_DIGITS)]
        coarse = float(torch.tensor(loss, dtype=torch.float32))
        fine = loss - coarse if math.isfinite(coarse) else 0.0
        self._numbers = torch.tensor([*digits, coarse, fine, stop, end, action, *of_ranks], dtype=torch.float32)
        self._waiting = True

    def all_reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Sum a bucket of gradients over the ranks, and the numbers with it if they are waiting."""
        gradients = bucket.buffer()
        self.look(gradients)
        together = gradients
        if self._waiting and gradients.is_cpu and gradients.dtype == torch.float32:
            self._waiting = False
            together = torch.cat((gradients, self._numbers))
        work = dist.all_reduce(together, async_op=True)
        assert work is not None

        def arrived(sent: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            sent.value()  # raises what went wrong; without it this rank would go on with its own gradients
            if together is not gradients:
                gradients.copy_(together[: gradients.numel()])
                self._numbers = together[gradients.numel() :]
            return gradients

        done: torch.futures.Future[torch.Tensor] = work.get_future().then(arrived)
        return done

    def depart(self) -> None:
        """Send the numbers alone, if the backward pass that is over took none along. All ranks must reach this."""
        self._level = time.monotonic()
        if self._waiting:
            self._waiting = False
            self._work = dist.all_reduce(self._numbers, async_op=True)

    def totals(self) -> Totals:
        """Wait for the sums."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        numbers = self._numbers.tolist()
        digits, (coarse, fine, stop, end, action, *of_ranks) = numbers[:_DIGITS], numbers[_DIGITS:]
        own_s, orders = of_ranks[: len(of_ranks) // 2], map(int, of_ranks[len(of_ranks) // 2 :])
        count = sum(int(digit) << (_BITS * place) for place, digit in enumerate(digits))
        return Totals(count, coarse + fine, stop > 0, end > 0, int(action), tuple(own_s), tuple(orders))


def _mark(gradients: torch.Tensor) -> torch.Tensor:
    """A sum of the bits, as whole numbers: it changes with any of them, and takes no longer than a sum does."""
    flat = gradients.reshape(-1)
    even = flat.numel() - flat.numel() % 8  # of whichever type, a multiple of 8 bytes
    mark = flat[:even].view(torch.int64).sum()
    return mark + flat[even:].view(torch.uint8).sum() if even < flat.numel() else mark


def finished(value: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """A result that is there already, in the form that DDP waits for."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[value.device] if value.is_cuda else None)
    future.set_result(value)
    return future
