"""A model on all ranks: DDP, made so that a restart doesn't change the order of any addition.

DDP lays its buckets out anew after the first backward pass, in the order in which gradients arrived, and a sum over
three ranks or more depends on where in a bucket an element lies. A resumed run would therefore add in another order in
its first step than the undisturbed run did. So the new layout is brought about before the first step, by a backward
pass that computes nothing and exchanges nothing, in an order that is the same in every start.
"""

# No `from __future__ import annotations` here: DDP looks at the types that its hook is annotated with.
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.training.exchange import Exchange


def parallelize(model: nn.Module, device: torch.device, exchange: Exchange) -> nn.Module:
    """Move a model to this rank's device, and have its gradients summed over the ranks if there are several.

    Gradients are sums, not means: `Step.update` divides once, by what all ranks have counted.

    :param exchange: what the gradients are summed by.
    """
    model = model.to(device)
    same_buffers(model.buffers())
    if dist.get_world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(exchange, _sum)
    _settle(wrapped, exchange)
    return wrapped


def same_buffers(buffers: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's buffers (running means and the like). All ranks must reach this, with the same ones.

    DDP does so before a step's first forward pass, for the models that it wraps. Done after each step, the buffers of
    all models are equal in a checkpoint as well, and whether one is saved makes no difference to the training.
    """
    if dist.get_world_size() == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for buffer in buffers:
        by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for same in by_kind.values():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in same])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
            buffer.detach().copy_(part.view_as(buffer))


def _sum(exchange: Exchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: a sum, without DDP's division by the world size."""
    return exchange.all_reduce(bucket)


def _settle(wrapped: DistributedDataParallel, exchange: Exchange) -> None:
    """Bring about DDP's final layout of buckets, without a sum and without a real gradient."""
    module = wrapped.module
    exchange.silent = True
    wrapped.module = _Stub([p for p in module.parameters() if p.requires_grad])
    wrapped.require_forward_param_sync = False  # the stub has no buffers that DDP could broadcast
    try:
        wrapped().backward()
    finally:
        wrapped.module = module
        exchange.silent = False
    wrapped.zero_grad(set_to_none=True)


class _Stub(nn.Module):
    """Takes no input, and depends on all parameters, with a gradient of zero that reaches the last of them first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.borrowed = (parameters,)  # in a tuple, so that they don't become this module's own

    def forward(self) -> torch.Tensor:
        chain = torch.zeros((), requires_grad=True)
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
