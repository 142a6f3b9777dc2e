"""What `reduction="exact"` needs besides its sums, and what it can't do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn, optim
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dtrain.checkpoint.state import State, bare

ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.ASGD, optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop),
)
"""Optimizers that work element by element: what comes of one doesn't depend on where its tensor is cut."""


def make_deterministic(device: torch.device) -> None:
    """Have torch use deterministic algorithms only, and raise where an operator has none."""
    # cuBLAS reads it when it starts; with more workspaces than one it may choose by what else is running.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # What it fills memory with is of use only to find those who read what they haven't written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Products of matrices are cut up among threads. torchrun gives each of several processes one, and this is the
        # same for a process that is alone.
        torch.set_num_threads(1)


def inexact_parts(state: State, models: Iterable[nn.Module]) -> Iterator[str]:
    """What still depends on the number of ranks, each as a sentence."""
    for model in dict.fromkeys([*map(bare, models), *state.modules().values()]):
        kinds = {type(module).__name__ for module in model.modules() if _has_running_statistics(module)}
        if kinds:
            yield (
                f"the running statistics of {', '.join(sorted(kinds))} follow the micro-batches of rank 0, and which "
                "those are depends on the number of ranks; training doesn't use them, evaluation does"
            )
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            yield "SyncBatchNorm takes its statistics over all ranks: the result depends on their number"
    for name, value in state.objects.items():
        if not isinstance(value, Optimizer):
            continue
        if any(group.get("fused") for group in value.param_groups):
            yield f"{name}: fused optimizers round by where a tensor is cut; leave fused out with parallel='fsdp'"
        cut = any(isinstance(parameter, DTensor) for group in value.param_groups for parameter in group["params"])
        if cut and type(value) not in ELEMENTWISE:
            yield (
                f"{name}: a {type(value).__qualname__} isn't known to work element by element, and where its tensors "
                "are cut depends on the number of ranks; take one of torch.optim's that do, or parallel='ddp'"
            )


def name_changed_buffers(models: Iterable[nn.Module], tell: Callable[[str], object]) -> None:
    """Tell which buffers the first forward pass for training changes, as nothing else does: it can't be seen before."""
    for model in dict.fromkeys(map(bare, models)):
        _watch(model, tell)


def _watch(model: nn.Module, tell: Callable[[str], object]) -> None:
    known = {
        name.lstrip(".")
        for prefix, module in model.named_modules()
        if _has_running_statistics(module)  # they are named at the start
        for name in (f"{prefix}.{key}" for key, _ in module.named_buffers(recurse=False))
    }
    before: dict[str, tuple[int, int]] = {}

    def marks() -> dict[str, tuple[int, int]]:
        # Whether it is written to in place, or another tensor takes its place.
        return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers() if name not in known}

    def enter(*_: Any) -> None:
        if model.training and torch.is_grad_enabled():
            before.update(marks())

    def leave(*_: Any) -> None:
        if not before:
            return
        changed = [name for name, mark in marks().items() if before.get(name) != mark]
        before.clear()
        entering.remove()
        leaving.remove()
        if changed:
            tell(
                f"forward passes change {', '.join(changed)} by a rank's own micro-batches, and which those are "
                "depends on the number of ranks; where training uses them, the result does too"
            )

    if any(name not in known for name, _ in model.named_buffers()):
        entering = model.register_forward_pre_hook(torch.compiler.disable(enter))
        leaving = model.register_forward_hook(torch.compiler.disable(leave))


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats
