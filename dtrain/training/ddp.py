"""A model on all ranks: DDP, made so that a restart doesn't change the order of any addition.

DDP lays its buckets out anew after the first backward pass, in the order in which gradients arrived, and a sum over
three ranks or more depends on where in a bucket an element lies. A resumed run would therefore add in another order in
its first step than the undisturbed run did. So the new layout is brought about before the first step, by a backward
pass that computes nothing and exchanges nothing, in an order that is the same in every start.

With `reduction="exact"` DDP's hook only sends a bucket's sums off, while the backward pass goes on; what comes of them
is gathered after it, in the order of the buckets, so that all ranks start their collectives in the same order.
"""

# No `from __future__ import annotations` here: DDP looks at the types that its hooks are annotated with.
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.training.exchange import Exchange, finished
from dtrain.training.reduce import Pending, Sums
from dtrain.training.wrapped import Turn, Wrapped


class Replicated(Wrapped):
    """A model that all ranks have a copy of.

    :param exchange: what sums the gradients, if they aren't to be exact.
    """

    module: DistributedDataParallel

    def __init__(self, model: nn.Module, exchange: Exchange, *, exact: bool) -> None:
        super().__init__(DistributedDataParallel(model, gradient_as_bucket_view=True), exact=exact)
        self._silent = True
        self._exchange = exchange
        self._sent: list[tuple[torch.Tensor, Pending]] = []
        self._arrived = 0  # parameters whose gradients have come to the hook
        self.module.register_comm_hook(self, _tree if exact else _sum)
        _settle(self.module)
        self._silent = False

    def begin(self, turn: Turn) -> None:
        super().begin(turn)
        self.module.require_backward_grad_sync = turn.last
        self._arrived = 0
        if turn.first:
            self._check_trained()

    def end(self) -> None:
        if not self.exact:
            return
        if not self._turn.last:
            self._keep(self._trained())
            return
        gathered = []
        for bucket, pending in self._sent:
            segment = pending.segment()
            whole = segment.new_empty(segment.numel() * dist.get_world_size())
            work = dist.all_gather(list(whole.view(-1, segment.numel())), segment, async_op=True)
            gathered.append((bucket, whole, work))
        self._sent.clear()
        for bucket, whole, work in gathered:
            work.wait()
            bucket.copy_(whole[: bucket.numel()])

    def check(self) -> None:
        # DDP would notice in the next forward pass, when this step's gradients, of which some were never exchanged,
        # have long been used.
        if self._turn.last and self._arrived != len(self.trained):
            raise RuntimeError("DDP was not reached by the backward pass")
        self.module._check_reducer_finalized()

    def sum(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._arrived += len(bucket.parameters())
        return finished(bucket.buffer()) if self._silent else self._exchange.all_reduce(bucket)

    def send(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The last micro-batch's gradients, with the sums of those before it, are on their way to all ranks."""
        flat, turn = bucket.buffer(), self._turn
        self._arrived += len(bucket.parameters())
        if not self._silent:
            sums = Sums(turn.length)
            places: dict[torch.Tensor, int] = {parameter: place for place, parameter in enumerate(self._trained())}
            mine = [places[parameter] for parameter in bucket.parameters()]
            for node in self._sums.nodes:
                sums.add(node.first, node.end, [torch.cat([_as_in_a_bucket(node.parts[place]) for place in mine])])
            sums.add(turn.index, turn.index + 1, [flat])
            nodes = [node.parts[0] for node in sums.nodes]
            for gradients in nodes:
                self._exchange.look(gradients)
            self._sent.append((flat, Pending(nodes, turn.length, 1)))
        return finished(flat)


def _sum(model: Replicated, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: a sum, without DDP's division by the world size."""
    return model.sum(bucket)


def _tree(model: Replicated, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The same, for sums that don't depend on the world size."""
    return model.send(bucket)


def _as_in_a_bucket(gradient: torch.Tensor) -> torch.Tensor:
    """Flat, in the order that DDP lays it down in: as it lies in memory, if it has no gaps there; complex numbers as
    pairs of real ones."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    if gradient.is_contiguous():
        return gradient.view(-1)
    dense = torch.empty_like(gradient, device="meta").stride() == gradient.stride()
    return gradient.as_strided((gradient.numel(),), (1,)) if dense else gradient.reshape(-1)


def _settle(wrapped: DistributedDataParallel) -> None:
    """Bring about DDP's final layout of buckets, without a sum and without a real gradient."""
    module = wrapped.module
    wrapped.module = _Stub([p for p in module.parameters() if p.requires_grad])
    wrapped.require_forward_param_sync = False  # the stub has no buffers that DDP could broadcast
    try:
        wrapped().backward()
    finally:
        wrapped.module = module
    wrapped.zero_grad(set_to_none=True)


class _Stub(nn.Module):
    """Takes no input, and depends on all parameters, with a gradient of zero that reaches the last of them first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.borrowed = (parameters,)  # in a tuple, so that they don't become this module's own

    def forward(self) -> torch.Tensor:
        # On their device: autograd goes through what lies on another one in a thread of its own, in no certain order.
        chain = torch.zeros((), requires_grad=True, device=self.borrowed[0][0].device)
        for parameter in self.borrowed[0]:
            chain = _Link.apply(chain, parameter)  # type: ignore[no-untyped-call]
        return chain


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        ctx.parameter = parameter
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        zero = ctx.parameter.new_zeros(())
        return gradients[0], zero.expand_as(ctx.parameter)
