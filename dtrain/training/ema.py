"""`EMA`: an exponential moving average of a model's weights, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.state import bare
from dtrain.errors import UsageError


class EMA(nn.Module):
    """After each step that the optimizer takes, `average = decay * average + (1 - decay) * weights`; at first, the
    average is the weights as they are when it is made.

    To be tracked like the model: `run.track(model=model, ema=ema)`. Its names are those of the model, so a checkpoint's
    average can be loaded into a model: `dtrain.checkpoint.load(run, {"ema": model})`. Under FSDP and HSDP each rank has
    its part of it. Buffers, such as running means, aren't averaged and aren't in it.

    :param model: as `run.parallelize` gave it.
    :param optimizer: the one that trains it.
    :param decay: how much of the average stays in a step; of 0.999, a thousand steps count.
    :raises UsageError: decay isn't between 0 and 1.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, decay: float = 0.999) -> None:
        super().__init__()
        if not isinstance(decay, int | float) or not 0 < decay < 1:
            raise UsageError(f"EMA(decay={decay!r}) must be between 0 and 1, such as 0.999")
        self._decay = decay
        self.active = False
        """Whether the model holds the average just now."""
        weights, averages = [], []
        for name, weight in bare(model).named_parameters():
            average = nn.Parameter(weight.detach().clone(), requires_grad=False)
            _put(self, name, average)
            weights.append(local_part(weight))
            averages.append(local_part(average))
        self._pairs = (weights, averages)  # a tuple of lists: what nn.Module doesn't take for its own
        optimizer.register_step_post_hook(self._after)
        vars(optimizer).setdefault("_dtrain_averages", []).append(self)  # for `State.check`

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if bool(getattr(optimizer, "found_inf", False)):  # a fused one was called by a GradScaler, and did nothing
            return
        weights, averages = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and nothing may be saved there."""
        weights, averages = self._pairs
        if any(weight.is_cuda for weight in weights):
            torch.cuda.synchronize()  # a snapshot's copy of the weights may still be under way
        with torch.no_grad():
            kept = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, averages)
        self.active = True
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)
            self.active = False


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module a parameter with a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_parameter(last, parameter)
