"""Benign or malignant: a small network on scikit-learn's breast cancer data, where accuracy is the wrong metric.

569 samples of 30 measured features, 212 of them malignant, which is what has to be found ("positive"). They are split
into training, validation and test, 60 : 20 : 20 in both classes. Of the malignant ones for training most are left out,
until they are a tenth of it, as illness is rare where such data is collected. Validation and test keep all of theirs:
with fewer, recall could not be measured finely. Precision depends on how many are ill, so what is found here holds
where 37 of 100 are.

The best model is the one with the highest recall at a precision of 0.95. The run stops when that gets no better. Then
the best checkpoint is loaded, its threshold taken from the validation data, and the test data looked at, once:

    pip install 'dtrain[examples]'
    python -m dtrain.examples.cancer --dir runs/cancer
    torchrun --standalone --nproc-per-node 2 -m dtrain.examples.cancer --dir runs/cancer --reduction exact
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.checkpoint import load
from dtrain.errors import ConfigError
from dtrain.training.evaluate import Metric

_PARTS = (0.6, 0.2)
"""Shares of training and validation; the rest is the test."""
_GOES_BY = "val/at_precision/recall"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a classifier of tumours that is chosen by its recall."""

    dir: str = "runs/cancer"
    """Folder of the run."""

    epochs: int = 100
    """How often all samples are used, at most."""

    patience: int = 15
    """The run stops after so many epochs in which recall got no better."""

    precision_wanted: float = 0.95
    """How many of those who are said to be ill have to be."""

    malignant: float = 0.1
    """Share of the malignant samples in the training. The data has 0.37."""

    global_batch: int = 32
    """Samples in a step, over all processes together."""

    micro_batch: int = 8
    """Samples in one forward and backward pass."""

    seed: int = 0
    """Fixes the split, the first weights, the order of the samples and the dropout."""

    lr: float = 1e-2
    """Learning rate."""

    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "ddp"
    """How the model is spread over the processes."""

    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are added up: exact gives the same bits on any number of processes."""


class Network(nn.Sequential):
    """Features in, of shape (batch, 30); one logit each out, above zero for malignant."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(30, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0))


class RecallAtPrecision:
    """A metric: the highest recall that any threshold reaches at so high a precision, and that threshold."""

    def __init__(self, precision: float) -> None:
        from torchmetrics.classification import BinaryRecallAtFixedPrecision

        self._metric = BinaryRecallAtFixedPrecision(precision)

    def update(self, scores: Tensor, targets: Tensor) -> None:
        self._metric.update(scores, targets)

    def compute(self) -> dict[str, float]:
        recall, threshold = self._metric.compute()
        # Where no threshold will do, nobody is said to be ill.
        return {"recall": float(recall), "threshold": float(threshold) if recall > 0 else 1.0}

    def reset(self) -> None:
        self._metric.reset()


def scores(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """How likely each sample is malignant, and whether it is. For metrics: by themselves, torchmetrics take numbers
    for logits in one batch and for probabilities in another, by whether they lie between 0 and 1."""
    features, targets = batch
    return model(features).float().sigmoid(), targets


@dataclass(frozen=True)
class Split:
    """The data, standardised by mean and deviation of the training part."""

    training: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def read(options: Options) -> Split:
    """Split so that each part but the training has the same share of malignant samples; by the seed alone."""
    # The linear algebra that comes with scikit-learn starts threads when it is loaded, and none may be there at launch.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ConfigError("the data comes with scikit-learn: pip install 'dtrain[examples]'") from error
    if not 0 < options.malignant < 1:
        raise ConfigError(f"--malignant {options.malignant}: a share is between 0 and 1, such as 0.1")
    found = load_breast_cancer()
    features, malignant = np.asarray(found.data), np.asarray(found.target == 0)
    random = np.random.default_rng(options.seed)
    parts: list[list[np.ndarray[Any, Any]]] = [[], [], []]
    for label in (False, True):  # the benign ones first, whose number says how many malignant ones are trained on
        indices = random.permutation(np.flatnonzero(malignant == label))
        cuts = np.cumsum([round(len(indices) * share) for share in _PARTS])
        training, validation, test = np.split(indices, cuts)
        if label:
            training = training[: round(len(parts[0][0]) * options.malignant / (1 - options.malignant))]
        for part, chosen in zip(parts, (training, validation, test), strict=True):
            part.append(chosen)
    training, validation, test = (np.concatenate(part) for part in parts)
    mean, deviation = features[training].mean(axis=0), features[training].std(axis=0)

    def samples(part: np.ndarray[Any, Any]) -> TensorDataset:
        standard = ((features[part] - mean) / deviation).astype(np.float32)
        return TensorDataset(torch.from_numpy(standard), torch.from_numpy(malignant[part].astype(np.int64)))

    return Split(samples(training), samples(validation), samples(test))


def measures(options: Options) -> dict[str, Metric]:
    """What is measured after every epoch, by name. But for the first and the AUROC, it is at a threshold of a half."""
    try:
        from torchmetrics import classification as of
    except ImportError as error:
        raise ConfigError("the metrics are torchmetrics' own: pip install 'dtrain[examples]'") from error
    if not 0 < options.precision_wanted <= 1:
        raise ConfigError(f"--precision-wanted {options.precision_wanted}: must be above 0, and 1 at most")
    return {
        "at_precision": RecallAtPrecision(options.precision_wanted),
        "accuracy": of.BinaryAccuracy(),
        "precision": of.BinaryPrecision(),
        "recall": of.BinaryRecall(),
        "f1": of.BinaryF1Score(),
        "auroc": of.BinaryAUROC(),
        "confusion": of.BinaryConfusionMatrix(),
    }


def train(run: dtrain.Run, *, options: Options, split: Split, metrics: dict[str, Metric]) -> None:
    """Every process calls it, and again after a fault."""
    o = options
    model = run.parallelize(Network())
    data = run.data(split.training)
    epoch = len(split.training) // o.global_batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.01)
    run.track(model=model, optimizer=optimizer)

    for step in run.steps(o.epochs * epoch):
        for x, y in step.micro_batches(data):
            step.backward(F.binary_cross_entropy_with_logits(model(x), y.float(), reduction="sum"), count=len(y))
        step.update(optimizer)
        if step.number % epoch == 0:
            found = run.evaluate(model, split.validation, metrics, outputs=scores)
            if run.is_first:
                print(f"epoch {step.number // epoch}: {told(found)}", flush=True)

    judge(run, split, metrics)


def judge(run: dtrain.Run, split: Split, metrics: dict[str, Metric]) -> None:
    """What the best model is worth, on data that had no part in choosing it."""
    assert run.best is not None
    number, recall = run.best
    best = Network().to(run.device)
    load(run.config.dir, {"model": best}, step="best")
    threshold = run.evaluate(best, split.validation, metrics, outputs=scores)["val/at_precision/threshold"]

    def decided(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        likely, targets = scores(model, batch)
        return (likely >= threshold).long(), targets

    at_threshold = {name: metrics[name] for name in ("confusion", "accuracy", "precision", "recall", "f1")}
    found = run.evaluate(best, split.test, at_threshold, outputs=decided, name="test")
    if run.is_first:
        print(f"best: step {number}, validation recall {recall:.4f}, at threshold {threshold:.4f}")
        print(table(found.pop("test/confusion")))
        print(told(found), flush=True)


def told(values: dict[str, Any]) -> str:
    """Of tensors, the numbers in them, row by row."""
    return ", ".join(
        f"{name.partition('/')[2]} {value.tolist() if isinstance(value, Tensor) else f'{value:.3f}'}"
        for name, value in values.items()
    )


def table(confusion: Tensor) -> str:
    """A confusion matrix, for people."""
    rows = [["test set", "said benign", "said malignant"]]
    rows += [
        [name, *map(str, row)] for name, row in zip(("benign", "malignant"), confusion.int().tolist(), strict=True)
    ]
    return "\n".join(f"{name:<10}{one:>14}{other:>16}" for name, one, other in rows)


def start(options: Options) -> None:
    """Read the data, then hand the training to dtrain."""
    o = options
    dtrain.launch(
        functools.partial(train, options=o, split=read(o), metrics=measures(o)),
        dtrain.Config(
            dir=o.dir,
            global_batch=o.global_batch,
            micro_batch=o.micro_batch,
            seed=o.seed,
            parallel=o.parallel,
            reduction=o.reduction,
            keep_best=dtrain.Best(_GOES_BY, mode="max", k=3),
            early_stop=dtrain.EarlyStop(_GOES_BY, mode="max", patience=o.patience),
        ),
    )


def cli() -> None:
    start(tyro.cli(Options, prog="python -m dtrain.examples.cancer"))


if __name__ == "__main__":
    cli()
