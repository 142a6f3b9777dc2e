"""The order in which samples are used: a permutation for each epoch, without a table of it."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from dtrain.training.random import derive

Ids = npt.NDArray[np.int64]

_AT_ONCE = 512
"""So many positions are worked out together, as a few take as long as many: those of the next steps as well."""


class Order:
    """The samples of all epochs as one endless sequence: epoch after epoch, each in an order of its own.

    :param length: of the data set.
    :param shuffle: False keeps the data set's own order.
    """

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length = length
        self._seed = seed
        self._shuffle = shuffle
        self._known_from = 0
        self._known: Ids = np.zeros(0, dtype=np.int64)

    def ids(self, first: int, end: int) -> Ids:
        """The samples at these positions of the sequence. What it takes doesn't depend on where they are, or on the
        length of the data set."""
        if not self._known_from <= first <= end <= self._known_from + len(self._known):
            self._known_from, self._known = first, self._ids(first, max(end, first + _AT_ONCE))
        return self._known[first - self._known_from : end - self._known_from].copy()

    def _ids(self, first: int, end: int) -> Ids:
        positions = np.arange(first, end)
        ids = positions % self.length
        if self._shuffle and len(ids):
            epochs = positions // self.length
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                here = epochs == epoch
                ids[here] = permute(ids[here], self.length, derive(self._seed, "order", epoch))
        return ids


def block(length: int, rank: int, world_size: int) -> range:
    """The part of a list that falls to a rank: contiguous, and of equal length but for one."""
    return range(rank * length // world_size, (rank + 1) * length // world_size)


def permute(positions: Ids, length: int, key: int, rounds: int = 8) -> Ids:
    """Where a permutation of `range(length)` takes each of `positions`, without a table of it.

    A balanced Feistel network permutes the next larger power of four; what falls outside the range is sent through
    again until it is inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Its
    round function is multiplicative hashing: the highest bits of a product (Knuth, TAOCP volume 3, 6.4).

    :param key: another one gives another permutation.
    """
    half = max(3, ((length - 1).bit_length() + 1) // 2)
    shift, high, mask = np.uint64(half), np.uint64(64 - half), np.uint64((1 << half) - 1)
    keys = _round_keys(key, rounds)
    out = positions.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for addend, factor in keys:
            left, right = right, left ^ (((right + addend) * factor) >> high)
        out[outside] = (left << shift) | right
        outside = out >= length
    return out.astype(np.int64)


@functools.lru_cache
def _round_keys(key: int, rounds: int) -> list[tuple[np.uint64, np.uint64]]:
    return [
        (np.uint64(derive(key, "addend", number)), np.uint64(2 * derive(key, "factor", number) + 1))
        for number in range(rounds)
    ]
