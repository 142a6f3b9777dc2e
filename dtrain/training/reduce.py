"""`reduction="exact"`: gradients added up in an order that doesn't depend on the number of ranks.

Floating-point addition isn't associative, so a sum over ranks depends on how many there are. Here the order is that of
one fixed binary tree over a step's list of micro-batches: its leaves are their gradients, and a node splits its range
at the largest power of two below its length (the shape of RFC 6962's hash trees). A rank computes a contiguous block of
the leaves, and adds up whatever subtrees lie in it. Then an all-to-all gives each rank a segment of all these sums, of
which it adds up the rest of the tree; where every rank needs the whole, an all-gather follows. Where blocks are
subtrees, as with 2 or 4 ranks and 8 micro-batches, these are the bytes of a ring all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dtrain.training.order import block


class Node(NamedTuple):
    """The sum of neighbouring leaves: of all from `first` to before `end`."""

    first: int
    end: int
    parts: list[torch.Tensor]


class Sums:
    """Sums of leaves, which come in order; two nodes of the tree that make up a third are added at once.

    :param length: how many leaves the tree has.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.nodes: list[Node] = []

    def add(self, first: int, end: int, parts: list[torch.Tensor]) -> None:
        """Take a node, whose memory is used from then on."""
        self.nodes.append(Node(first, end, parts))
        while len(self.nodes) > 1 and self._siblings(*self.nodes[-2:]):
            right, left = self.nodes.pop(), self.nodes.pop()
            if left.parts:
                torch._foreach_add_(left.parts, right.parts)
            self.nodes.append(Node(left.first, right.end, left.parts))

    def total(self) -> list[torch.Tensor]:
        """The sum of all leaves."""
        (root,) = self.nodes
        assert (root.first, root.end) == (0, self._length)
        return root.parts

    def _siblings(self, left: Node, right: Node) -> bool:
        size = left.end - left.first
        aligned = size & (size - 1) == 0 and left.first % (2 * size) == 0
        return aligned and (right.end - right.first == size or right.end == self._length)


def spans(length: int, leaves: range) -> list[tuple[int, int]]:
    """The subtrees that a block of leaves is made of."""
    sums = Sums(length)
    for leaf in leaves:
        sums.add(leaf, leaf + 1, [])
    return [(node.first, node.end) for node in sums.nodes]


class Pending:
    """An all-to-all that is under way.

    :param nodes: this rank's sums, in order; flat, and of equal length on all ranks. A vector is made of `shards` equal
        parts, of which each is cut again into segments for the ranks that share it: rank `r * shards + s` gets the
        `r`-th segment of the `s`-th part.
    :param length: of the list of micro-batches.
    :param group: the ranks, in the order of their blocks; None for all.
    """

    def __init__(
        self, nodes: Sequence[torch.Tensor], length: int, shards: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self._length = length
        world_size = dist.get_world_size(group)
        replicas = world_size // shards
        part = nodes[0].numel() // shards
        segment = -(-part // replicas)
        self._spans = [spans(length, block(length, rank, world_size)) for rank in range(world_size)]
        sent = nodes[0].new_empty(replicas, shards, len(nodes), segment)
        for number, node in enumerate(nodes):
            padded = F.pad(node.view(shards, part), (0, replicas * segment - part))
            sent[:, :, number] = padded.view(shards, replicas, segment).transpose(0, 1)
        counts = [len(found) for found in self._spans]
        self._rows = nodes[0].new_empty(sum(counts), segment)
        self._sent = sent  # until it is
        self._work = dist.all_to_all_single(
            self._rows.view(-1),
            sent.view(-1),
            [count * segment for count in counts],
            [len(nodes) * segment] * world_size,
            group=group,
            async_op=True,
        )

    def segment(self) -> torch.Tensor:
        """This rank's segment of the sum over all leaves."""
        assert self._work is not None
        self._work.wait()
        sums = Sums(self._length)
        rows = iter(self._rows)
        for found in self._spans:
            for first, end in found:
                sums.add(first, end, [next(rows)])
        return sums.total()[0]
