"""What a loop gives to a step, looked at before it can do harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dtrain.config import Config
from dtrain.errors import UsageError
from dtrain.training.exchange import MOST

_MEAN = 1
"""What torch's losses remember of `reduction="mean"`."""


def check_loss(step: int, loss: object, count: object) -> None:
    """See `Step.backward`. :raises UsageError:"""
    if not isinstance(loss, torch.Tensor):
        raise UsageError(f"step {step}: backward takes the loss as a tensor, and not {loss!r}")
    if loss.numel() != 1:
        raise UsageError(f"step {step}: the loss has shape {tuple(loss.shape)}; make it one number, a sum")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < MOST:
        raise UsageError(f"step {step}: count={count!r} must be a whole number from 0 to {MOST - 1}")
    if loss.dtype == torch.float16:
        raise UsageError(
            f"step {step}: the loss is a sum in float16, which ends at 65,504; compute it in float32, as in "
            "F.cross_entropy(logits.float(), ...)"
        )
    last = loss.grad_fn  # what was computed last
    if count > 1 and last is not None and _is_mean(last):
        raise UsageError(
            f"step {step}: the loss is a mean, and count={count} says that it is a sum over {count} terms, which is "
            'divided once, by the count of all ranks: compute it with reduction="sum", or .sum(); or give count=1, '
            "for each micro-batch to count the same"
        )


def _is_mean(last: Any) -> bool:
    if last.name().startswith("MeanBackward"):  # not of one number, such as a sum in a tensor with dimensions
        return getattr(last, "_saved_self_sym_numel", 2) > 1
    return getattr(last, "_saved_reduction", None) == _MEAN


def check_update(step: int, optimizer: object, schedulers: Sequence[object], clip: object) -> None:
    """See `Step.update`. :raises UsageError:"""
    if clip is not None and not (isinstance(clip, int | float) and clip > 0):
        raise UsageError(f"step {step}: update(clip={clip!r}) must be a number above 0")
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
        raise UsageError(
            f"step {step}: update takes an optimizer that needs one gradient for a step, such as AdamW, and not a "
            f"{type(optimizer).__qualname__}"
        )
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        raise UsageError(
            f"step {step}: a ReduceLROnPlateau goes by a measurement; call its step(value) yourself, behind update and "
            "an evaluation"
        )


def check_metrics(metrics: Mapping[str, Any], config: Config) -> dict[str, float]:
    """What was measured, as numbers.

    :raises UsageError: one of them is none, or that of `keep_best` is missing.
    """
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"save(metrics={{{name!r}: {value!r}}}): must be a number") from error
    if config.keep_best is not None and config.keep_best.metric not in found:
        raise UsageError(
            f"save(metrics={found}): keep_best goes by {config.keep_best.metric!r}, which is not among them; give it "
            "too, or change keep_best"
        )
    return found


def refuse_by_hand(optimizer: Optimizer, under_way: Callable[[Optimizer], int]) -> None:
    """Have an optimizer's own `step` refused where its gradients are still sums of this rank's, or of all of them.

    :param under_way: gives the number of the step of which that is true of it; 0 if there is none.
    """

    def look(*_: object) -> None:
        if number := under_way(optimizer):
            raise UsageError(
                f"step {number}: {type(optimizer).__qualname__}.step() was called before step.update, and would take "
                "sums for means; leave it to step.update, which divides and clips first"
            )

    optimizer.register_step_pre_hook(look)
