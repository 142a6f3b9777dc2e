"""What `reduction="exact"` needs besides its sums, and what it can't do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dtrain.checkpoint.state import State, bare


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
        if isinstance(value, Optimizer) and any(group.get("fused") for group in value.param_groups):
            yield f"{name}: fused optimizers round by where a tensor is cut; leave fused out with parallel='fsdp'"


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats
