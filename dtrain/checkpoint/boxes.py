"""Boxes: parts of a tensor, and where their elements lie in a file that holds the whole of it, or a larger box."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Box(NamedTuple):
    """What is wanted of a chunk, where it has to be copied out of the blocks."""

    sizes: tuple[int, ...]
    """The chunk's."""
    start: tuple[int, ...]
    target: torch.Tensor
    dtype: torch.dtype
    payload: int
    """Where the chunk's first element lies in the file."""


class Part(NamedTuple):
    """A box of a chunk that lies in one piece in a block and holds something that is wanted."""

    first: int
    """Its first element's number in the chunk."""
    sizes: tuple[int, ...]
    low: tuple[int, ...]
    """Where what is wanted of it begins in the chunk, by dimension."""
    high: tuple[int, ...]
    start: tuple[int, ...]
    """Where the part itself begins."""


def parts(box: Box, begin: int, end: int) -> Iterator[Part]:
    """What a range of the file holds of a box, in pieces."""
    size = box.dtype.itemsize
    first = max(0, begin - box.payload) // size
    last = min(math.prod(box.sizes), (end - box.payload) // size)
    for start, sizes in _boxes(box.sizes, first, last):
        low = tuple(map(max, start, box.start))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(start, sizes, box.start, box.target.shape, strict=True))
        if all(map(operator.lt, low, high)):
            yield Part(first, sizes, low, high, start)
        first += math.prod(sizes)


def _boxes(sizes: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A range of the elements of a tensor, cut into boxes in the same order: 2n - 1 of them at most, in n dimensions.

    :returns: of each its start and its extent.
    """
    if first >= last:
        return
    if len(sizes) < 2:
        yield (first,) * len(sizes), (last - first,) * len(sizes)
        return
    row = math.prod(sizes[1:])
    while first < last:
        number, within = divmod(first, row)
        rows = (last - first) // row
        if within == 0 and rows:
            yield (number, *(0 for _ in sizes[1:])), (rows, *sizes[1:])
            first += rows * row
        else:
            stop = min(last, (number + 1) * row)
            for start, extent in _boxes(sizes[1:], within, within + stop - first):
                yield (number, *start), (1, *extent)
            first = stop


def index(sizes: Sequence[int], start: Sequence[int]) -> int:
    """An element's number in a tensor of these sizes."""
    number = 0
    for size, at in zip(sizes, start, strict=True):
        number = number * size + at
    return number


def in_one_piece(sizes: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether a box of these lengths takes up one range of a tensor's elements."""
    whole = True
    for size, length in zip(reversed(sizes), reversed(lengths), strict=True):
        if not whole and length != 1:
            return False
        whole = whole and length == size
    return True
