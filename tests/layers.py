"""A small model of blocks, and runs of it that are to come to the same in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from dtrain.checkpoint.state import bare
from tests.training import opened

FEATURES, WIDTH, CLASSES = 7, 13, 5
"""No number of ranks divides them."""
SAMPLES = 101


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width + 1)
        self.narrow = nn.Linear(2 * width + 1, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.dropout(self.narrow(F.gelu(self.wide(self.norm(x)))))
        return out


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(x)
        return out


@dataclass
class Curve:
    """What a run has come to."""

    losses: list[float]
    norms: list[float]
    """Of the gradients, before they were clipped."""
    keys: list[str]
    """Of the state dict."""
    digest: str
    """SHA-256 of all weights."""


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, FEATURES, generator=generator), torch.arange(SAMPLES) % CLASSES)


def curve(root: Path, steps: int, model: Callable[[], nn.Module] = Net, blocks: Any = None, **options: Any) -> Curve:
    """Train for so many steps in all, from where the folder stands. All ranks must reach it."""
    options = {"global_batch": 12, "micro_batch": 2} | options
    losses, norms = [], []
    with opened(root, **options) as run:
        net = run.parallelize(model(), blocks=blocks)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        data = run.data(samples())
        run.track(model=net, optimizer=optimizer)
        for step in run.steps(steps):
            for x, y in step.micro_batches(data):
                step.backward(F.cross_entropy(net(x).float(), y, reduction="sum"), count=len(y))
            step.update(optimizer, clip=0.5)
            losses.append(step.loss)
            norms.append(step.gradient_norm)
        return Curve(losses, norms, list(bare(net).state_dict()), digest_of(bare(net)))


def digest_of(model: nn.Module) -> str:
    """SHA-256 of all parameters. All ranks must reach it."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found.update(f"{name} {tuple(whole.shape)}\n".encode() + whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
