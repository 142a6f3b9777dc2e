"""Handwritten digits, recognised by a small convolutional network.

scikit-learn brings 1,797 pictures of 8 x 8 pixels; a fifth of them is held out. In training, each picture is shifted
and made noisy whenever it is drawn. After every epoch the averaged weights (EMA) are measured on the pictures that were
held out, and the three models with the best accuracy are kept:

    pip install 'dtrain[examples]'
    python -m dtrain.examples.digits --dir runs/digits
    torchrun --standalone --nproc-per-node 2 -m dtrain.examples.digits --dir runs/digits --reduction exact

It takes less than a minute on two CPU cores and comes to about 97 of 100. Kill it, and start it again: it goes on, to
the same result.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.errors import ConfigError
from dtrain.training.evaluate import Metric

_HELD_OUT = 5
"""Every fifth picture."""
_DECAY = 0.95
"""Of the averaged weights: twenty steps count, about an epoch."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a digit classifier that survives what happens to its processes."""

    dir: str = "runs/digits"
    """Folder of the run."""

    epochs: int = 20
    """How often all pictures are used."""

    global_batch: int = 64
    """Pictures in a step, over all processes together."""

    micro_batch: int = 16
    """Pictures in one forward and backward pass."""

    seed: int = 0
    """Fixes the first weights, the order of the pictures and how they are shifted."""

    lr: float = 3e-3
    """Learning rate at its highest."""

    workers: int = 0
    """Processes that prepare pictures ahead, for each process that trains."""

    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "ddp"
    """How the model is spread over the processes."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the passes."""

    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are added up: exact gives the same bits on any number of processes."""


class Pictures:
    """For training: each picture is another one whenever it is drawn. What is random follows from its place in the
    training, so it is the same on any number of ranks and after any restart.
    """

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self._pictures, self._labels = pictures, labels

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = (int(shift) for shift in torch.randint(-1, 2, (2,)))
        shifted = torch.roll(self._pictures[index], (down, right), dims=(1, 2))
        return shifted + 0.1 * torch.randn_like(shifted), self._labels[index]


class Network(nn.Sequential):
    """Pictures in, of shape (batch, 1, 8, 8); logits of ten digits out."""

    def __init__(self) -> None:
        def stage(channels: int, more: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, more, 3, padding=1, bias=False), nn.GroupNorm(4, more), nn.GELU(), nn.MaxPool2d(2)
            )

        super().__init__(stage(1, 32), stage(32, 64), nn.Flatten(), nn.Dropout(0.25), nn.Linear(256, 10))


def read() -> tuple[Tensor, Tensor]:
    """All pictures, of shape (number, 1, 8, 8), and what they show."""
    # The linear algebra that comes with scikit-learn starts threads when it is loaded, and none may be there at launch.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("the pictures come with scikit-learn: pip install 'dtrain[examples]'") from error
    found = load_digits()
    pictures = torch.from_numpy(np.asarray(found.images, dtype=np.float32) / 8 - 1).unsqueeze(1)
    return pictures, torch.from_numpy(found.target.astype(np.int64))


def measures() -> dict[str, Metric]:
    """What is measured after every epoch, by name."""
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    except ImportError as error:
        raise ConfigError("accuracy and F1 are torchmetrics' own: pip install 'dtrain[examples]'") from error
    return {
        "accuracy": MulticlassAccuracy(10, average="micro"),
        "f1": MulticlassF1Score(10, average="macro"),
        "loss": dtrain.Mean(F.cross_entropy),
    }


def train(run: dtrain.Run, *, options: Options, pictures: Tensor, labels: Tensor, metrics: dict[str, Metric]) -> None:
    """Every process calls it, and again after a fault."""
    o = options
    out = torch.arange(len(pictures)) % _HELD_OUT == 0
    model = run.parallelize(Network())
    data = run.data(Pictures(pictures[~out], labels[~out]), workers=o.workers)
    held_out = TensorDataset(pictures[out], labels[out])
    epoch = int((~out).sum()) // o.global_batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.epochs * epoch)
    ema = dtrain.EMA(model, optimizer, decay=_DECAY)
    run.track(model=model, optimizer=optimizer, schedule=schedule, ema=ema)

    for step in run.steps(o.epochs * epoch):
        for x, y in step.micro_batches(data):
            step.backward(F.cross_entropy(model(x).float(), y, reduction="sum"), count=len(y))
        step.update(optimizer, schedule, clip=1.0)
        if step.number % epoch == 0:
            found = run.evaluate(model, held_out, metrics, average=ema)
            if run.is_first:
                told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"epoch {step.number // epoch}: loss {step.loss:.4f}, {told}", flush=True)

    if run.is_first and run.best is not None:
        print("best: step {}, accuracy {:.4f}".format(*run.best), flush=True)


def start(options: Options) -> None:
    """Read the pictures, then hand the training to dtrain."""
    o = options
    pictures, labels = read()
    dtrain.launch(
        functools.partial(train, options=o, pictures=pictures, labels=labels, metrics=measures()),
        dtrain.Config(
            dir=o.dir,
            global_batch=o.global_batch,
            micro_batch=o.micro_batch,
            seed=o.seed,
            parallel=o.parallel,
            precision=o.precision,
            reduction=o.reduction,
            keep_best=dtrain.Best("val/accuracy", mode="max", k=3),
        ),
    )


def cli() -> None:
    start(tyro.cli(Options, prog="python -m dtrain.examples.digits"))


if __name__ == "__main__":
    cli()
