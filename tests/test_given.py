"""What a loop may give to a step by mistake is named before it can do harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import dtrain
from dtrain.errors import UsageError
from tests.layers import FEATURES, samples
from tests.training import opened
from tests.world import in_world

CLASSES = 5


@pytest.mark.parametrize(
    ("loss", "count", "message"),
    [
        (
            lambda out, y: F.cross_entropy(out, y),
            2,
            "the loss is a mean, and count=2 says that it is a sum over 2 terms",
        ),
        (lambda out, y: F.mse_loss(out, out.detach()), 10, "the loss is a mean"),
        (lambda out, y: out.mean(), 10, "the loss is a mean"),
        (lambda out, y: out.sum().item(), 2, "backward takes the loss as a tensor, and not "),
        (lambda out, y: None, 2, "backward takes the loss as a tensor, and not None"),
        (lambda out, y: F.cross_entropy(out, y), 1, ""),
        (lambda out, y: out.mean(dim=(0, 1)), 10, "the loss is a mean"),
        (lambda out, y: out.sum().reshape(1).mean(), 10, ""),
        (lambda out, y: out.sum(dim=(0, 1), keepdim=True).mean(dim=(0, 1)), 10, ""),
        (lambda out, y: F.cross_entropy(out, y) * len(y), 2, ""),
        (lambda out, y: F.cross_entropy(out, y, reduction="sum"), 2, ""),
    ],
)
def test_a_loss_that_is_no_sum_is_refused(tmp_path: Path, loss: Callable[..., Any], count: int, message: str) -> None:
    found = said(tmp_path, lambda step, *given: step.backward(loss(*given), count=count))
    assert found.startswith(message) if message else not found


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda step, optimizer: step.update([optimizer]), "update takes an optimizer that needs one gradient"),
        (lambda step, optimizer: step.update(None), "update takes an optimizer that needs one gradient"),
        (
            lambda step, optimizer: step.update(torch.optim.LBFGS([torch.ones(1, requires_grad=True)])),
            "update takes an optimizer that needs one gradient for a step, such as AdamW, and not a LBFGS",
        ),
        (
            lambda step, optimizer: step.update(optimizer, ReduceLROnPlateau(optimizer)),
            "a ReduceLROnPlateau goes by a measurement",
        ),
        (
            lambda step, optimizer: (optimizer.zero_grad(), step.update(optimizer)),
            "no parameter of this SGD has a gradient",
        ),
        (
            lambda step, optimizer: (step.update(optimizer), step.update(optimizer)),
            "no parameter of this SGD has a gradient: it was updated in this step before",
        ),
        (
            lambda step, optimizer: (optimizer.step(), step.update(optimizer)),
            "SGD.step() was called before step.update, and would take sums for means",
        ),
        (lambda step, optimizer: step.update(optimizer), ""),
        (lambda step, optimizer: (step.update(optimizer), optimizer.step()), ""),
    ],
)
def test_an_update_that_can_not_be_meant_is_refused(tmp_path: Path, update: Callable[..., Any], message: str) -> None:
    def backward(step: dtrain.Step, out: torch.Tensor, y: torch.Tensor) -> None:
        step.backward(F.cross_entropy(out, y, reduction="sum"), count=len(y))

    found = said(tmp_path, backward, update)
    assert found.startswith(message) if message else not found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_models_may_take_turns(tmp_path: Path, precision: str) -> None:
    """Each has an optimizer, and both are updated in every step: one of them has nothing to do."""

    def work(rank: int) -> list[bool]:
        with opened(tmp_path, parallel="none", precision=precision) as run:
            models = [nn.Linear(FEATURES, CLASSES) for _ in range(2)]
            for model in models:
                run.parallelize(model)
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
            data = run.data(samples())
            run.track(first=models[0], second=models[1], one=optimizers[0], other=optimizers[1])
            taken: list[object] = []
            for optimizer in optimizers:
                optimizer.register_step_post_hook(lambda optimizer, *_: taken.append(optimizer))
            changed = []
            for step in run.steps(4):
                turn = step.number % 2
                before = [model.weight.detach().clone() for model in models]
                for x, y in step.micro_batches(data):
                    step.backward(F.cross_entropy(models[turn](x).float(), y, reduction="sum"), count=len(y))
                for optimizer in optimizers:
                    step.update(optimizer, clip=1.0)
                now = [not torch.equal(model.weight, was) for model, was in zip(models, before, strict=True)]
                changed.append(now == [turn == 0, turn == 1])
                if step.number == 4:
                    optimizers[turn].zero_grad()
                    with pytest.raises(UsageError, match="no parameter of this SGD has a gradient"):
                        step.update(optimizers[turn])
            assert taken == [optimizers[1], optimizers[0]] * 2, "an average of the weights counts an optimizer's steps"
            return changed

    assert in_world(1, work) == [[True] * 4]


@pytest.mark.parametrize("parallelized", [True, False])
def test_a_step_by_hand_is_refused_for_each_optimizer_of_a_model_that_is_trained(
    tmp_path: Path, parallelized: bool
) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel="none") as run:
            models = [nn.Linear(FEATURES, CLASSES) for _ in range(2)]
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
            probe = nn.Linear(CLASSES, 1)
            probes = torch.optim.SGD(probe.parameters(), lr=0.1)
            if parallelized:
                for model in models:
                    run.parallelize(model)
            data = run.data(samples())
            run.track(first=models[0], second=models[1], one=optimizers[0], other=optimizers[1])
            if parallelized:
                run.track(probe=probe, probes=probes)
            for step in run.steps(2):
                for x, y in step.micro_batches(data):
                    out = models[0](x) + models[1](x)
                    step.backward(F.cross_entropy(out, y, reduction="sum"), count=len(y))
                    if parallelized:  # it isn't what the run trains
                        probes.zero_grad()
                        probe(out.detach()).sum().backward()
                        probes.step()
                step.update(optimizers[0])
                with pytest.raises(UsageError, match=r"SGD.step\(\) was called before step.update"):
                    optimizers[1].step()
                step.update(optimizers[1])
                optimizers[1].step()

    in_world(1, work)


def test_gradients_that_are_thrown_away_of_a_model_that_is_not_parallelized_are_missed(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel="none") as run:
            model = nn.Linear(FEATURES, CLASSES)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                for x, y in step.micro_batches(data):
                    step.backward(F.cross_entropy(model(x), y, reduction="sum"), count=len(y))
                optimizer.zero_grad()
                with pytest.raises(UsageError, match="no parameter of this SGD has a gradient"):
                    step.update(optimizer)
                break

    in_world(1, work)


def test_gradients_that_are_thrown_away_between_micro_batches_are_missed(tmp_path: Path) -> None:
    def backward(step: dtrain.Step, out: torch.Tensor, y: torch.Tensor) -> None:
        step.backward(F.cross_entropy(out, y, reduction="sum"), count=len(y))

    assert said(tmp_path, backward, zero=True).startswith("the gradients of the micro-batches before 1 are gone")


def test_an_embedding_with_sparse_gradients_is_refused_by_name(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run, pytest.raises(UsageError, match=r"parallelize: 0 has sparse=True"):
            run.parallelize(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1)))

    in_world(1, work)


def said(
    folder: Path,
    backward: Callable[..., Any],
    update: Callable[..., Any] = lambda step, optimizer: step.update(optimizer),
    *,
    zero: bool = False,
) -> str:
    """The error of a first step, without the step's number; empty if there is none."""

    def work(rank: int) -> str:
        with opened(folder, parallel="none") as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            try:
                for step in run.steps(1):
                    for x, y in step.micro_batches(data):
                        if zero:
                            optimizer.zero_grad()
                        backward(step, model(x), y)
                    update(step, optimizer)
            except UsageError as error:
                return str(error).removeprefix("step 1: ")
        return ""

    (found,) = in_world(1, work)
    return found
