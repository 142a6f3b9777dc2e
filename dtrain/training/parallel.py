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

from dtrain.checkpoint.state import bare
from dtrain.training.exchange import Exchange


def parallelize(model: nn.Module, device: torch.device, exchange: Exchange) -> nn.Module:
    """Move a model to this rank's device, and have its gradients summed over the ranks if there are several.

    Gradients are sums, not means: `Step.update` divides once, by what all ranks have counted.

    :param exchange: what the gradients are summed by.
    """
    model = model.to(device)
    if dist.get_world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(exchange, _sum)
    _settle(wrapped, exchange)
    return wrapped


def same_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which are the ones that count (running means and the like).

    DDP does the same before the next step's first forward pass; a checkpoint is taken before that. All ranks must
    reach this.
    """
    if dist.get_world_size() > 1:
        for buffer in bare(model).buffers():
            dist.broadcast(buffer, src=0)


def _sum(exchange: Exchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: a sum, without DDP's division by the world size."""
    return exchange.all_reduce(bucket)


def _settle(wrapped: DistributedDataParallel, exchange: Exchange) -> None:
    """Bring about DDP's final layout of buckets, without a sum and without a real gradient."""
    module = wrapped.module
    own = vars(module).get("forward")
    parameters = [p for p in module.parameters() if p.requires_grad]
    exchange.silent = True
    module.forward = lambda: _nothing_of(parameters)
    try:
        wrapped().backward()
    finally:
        del module.forward
        if own is not None:
            module.forward = own
        exchange.silent = False
    wrapped.zero_grad(set_to_none=True)


def _nothing_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Depends on all parameters, with a gradient of zero, which reaches the last parameter first."""
    chain = torch.zeros((), requires_grad=True)
    for parameter in parameters:
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
