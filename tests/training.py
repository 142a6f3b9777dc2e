"""A small run in the test's own forked ranks, without a supervisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.checkpoint.channel import Direct
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Slots
from dtrain.elastic.page import Page
from dtrain.elastic.placement import Placement
from dtrain.elastic.supervisor import Life
from tests.saving import connection

SAMPLES = 40


@contextmanager
def opened(root: Path | str, page: Page | None = None, **options: Any) -> Iterator[dtrain.Run]:
    """A run in this process, which is one rank of a group."""
    options = {"global_batch": 8, "micro_batch": 2, "save_every": 1000} | options
    config = dtrain.Config(dir=str(root), **options)
    placement = Placement(dist.get_rank(), dist.get_world_size(), local_world_size=dist.get_world_size())
    notes = dist.HashStore()  # without supervisors: the ranks are their own savers
    group: Any = SimpleNamespace(placement=placement, notes_store=lambda run: notes)
    slots = Slots()
    saver = Saver.of(config, connection(), placement.rank, placement.world_size, slots)
    life = Life(group, 0, page or Page.shared(), slots, Direct(saver, slots.board))
    run = dtrain.Run(config, torch.device("cpu"), life)
    yield run
    run.close()


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(samples, 4, generator=generator), torch.arange(samples))


def built(
    run: dtrain.Run, dropout: float = 0.0, samples: int = SAMPLES, *, constant: bool = False
) -> tuple[nn.Module, Any, dtrain.Data]:
    bare = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))
    if constant:
        bare.register_buffer("constant", torch.ones(3))
    model = run.parallelize(bare)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = run.data(dataset(samples))
    run.track(model=model, optimizer=optimizer)
    return model, optimizer, data


def train(
    root: Path | str,
    steps: int,
    *,
    page: Page | None = None,
    seen: Callable[[dtrain.Run, dtrain.Step], None] = lambda run, step: None,
    counted: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids >= 0,
    dropout: float = 0.0,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The weights after so many steps. Of each sample that is counted, the loss is the square of the output."""
    with opened(root, page, **options) as run:
        model, optimizer, data = built(run, dropout)
        for step in run.steps(steps):
            for x, ids in step.micro_batches(data):
                kept = counted(ids)
                loss = (model(x).squeeze(1) - 1).square() * kept
                step.backward(loss.sum(), count=int(kept.sum()))
            step.update(optimizer, clip=1.0)
            seen(run, step)
    weights: dict[str, torch.Tensor] = dict(unwrapped(model).state_dict())
    return weights


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)
