"""A model of which every rank keeps a part: FSDP2, and HSDP, where several groups of ranks keep one copy each.

Every forward and backward pass gathers parameters, so all ranks must make the same number of passes. Where the list of
micro-batches can't be shared out evenly, a rank that has one less makes a spare pass: over the input of its first
micro-batch, with a gradient of zero, unseen by the loop.

With `reduction="exact"` FSDP2 hands over each micro-batch's gradients in place of reducing them. They are kept, and
exchanged with those of the last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from dtrain.errors import UsageError
from dtrain.training.reduce import Pending, Sums
from dtrain.training.wrapped import Turn, Wrapped


class Sharded(Wrapped):
    """A model that `fully_shard` was applied to.

    :param group: the ranks that each have micro-batches of their own.
    :param shards: how many of them share a copy.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, shards: int, *, exact: bool) -> None:
        super().__init__(model, exact=exact)
        self.group = group
        self.shards = shards
        self._spare = 0
        self.is_spare = False
        self._root = next(part for part in model.modules() if isinstance(part, FSDPModule))
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # sums, which are divided once, by what was counted
                part.set_force_sum_reduction_for_comms(True)
                if exact:
                    reduce = _Reduce(self)
                    part.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]
                    if shards == 1:  # FSDP2 then has nothing to scatter
                        part.set_all_reduce_hook(reduce.alone)
        model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)

    @property
    def turn(self) -> Turn:
        return self._turn

    def begin(self, turn: Turn) -> None:
        self._turn = turn
        if turn.first:
            self._spare = turn.spare
        self._root.set_requires_gradient_sync(turn.last or self.exact)

    def look(self, spare: int) -> None:
        self._spare = spare

    def end(self) -> None:
        if self.exact and not self._turn.last:
            self._drop()

    def _drop(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._spare:
            passes, self._spare = self._spare, 0
            for _ in range(passes):
                self._spare_pass(args, kwargs)

    def _spare_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._root.set_requires_gradient_sync(self.exact)
        self.is_spare = True
        buffers = [buffer.clone() for buffer in self.module.buffers()]
        devices = {parameter.device for parameter in self.module.parameters()}
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            out = pytree.tree_leaves(self.module(*args, **kwargs))
            reached = [leaf for leaf in out if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if reached:
                torch.autograd.backward(reached, [torch.zeros_like(leaf) for leaf in reached])
        for buffer, before in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.is_spare = False
        if self.exact:
            self._drop()
        self._root.set_requires_gradient_sync(self._turn.last or self.exact)


class _Reduce:
    """What FSDP2 calls to reduce the gradients of one of its groups of parameters, in place of its own way."""

    def __init__(self, model: Sharded) -> None:
        self._model = model
        self._sums = Sums(1)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: object, **options: object
    ) -> None:
        """Keep a micro-batch's gradients; with the last one, fill the output with this rank's shard of the sum.

        All ranks must reach it. The output is worth nothing before.
        """
        model = self._model
        if not self._take(input_tensor):
            output_tensor.zero_()
            return
        nodes = [node.parts[0] for node in self._sums.nodes]
        segment = Pending(nodes, model.turn.length, model.shards, model.group).segment()
        if segment.numel() == output_tensor.numel():
            output_tensor.copy_(segment)
            return
        # Others have the rest of this shard, and FSDP2 adds it up next: -0.0 changes nothing that it is added to.
        output_tensor.fill_(-0.0)
        begin = dist.get_rank(model.group) // model.shards * segment.numel()
        mine = output_tensor[begin : begin + segment.numel()]
        mine.copy_(segment[: mine.numel()])

    def alone(self, gradients: torch.Tensor) -> None:
        """The same on a single rank, in place."""
        if self._take(gradients.clone()):
            gradients.copy_(self._sums.total()[0])

    def _take(self, gradients: torch.Tensor) -> bool:
        """:returns: whether these were the last."""
        model = self._model
        if model.is_spare:
            return False
        turn = model.turn
        if turn.first:
            self._sums = Sums(turn.length)
        known = self._sums.nodes[-1] if self._sums.nodes else None
        if known and (known.end > turn.index or known.parts[0].numel() != gradients.numel()):
            raise UsageError(
                "reduction='exact' with FSDP: a block was used twice in one micro-batch, or not with all of its "
                "parameters in each; use all of them once, or parallel='ddp'"
            )
        self._sums.add(turn.index, turn.index + 1, [gradients])
        return turn.last
