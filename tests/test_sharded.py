"""Sharded models whose ranks don't all do the same: what can be added up is, and the rest is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset

import dtrain
from dtrain.errors import UsageError
from tests.layers import CLASSES, WIDTH, Net, samples
from tests.training import opened
from tests.world import errors, in_world


@pytest.mark.parametrize("global_batch", [16, 12])
def test_sharded_layers_that_take_turns_get_the_gradients_of_one_process(tmp_path: Path, global_batch: int) -> None:
    """Even and odd samples each have a layer, of one size; with three micro-batches one rank makes a spare pass."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            return (self.a, self.b)[number % 2](x), self.unused(x)

    def work(rank: int, kind: str) -> dict[str, torch.Tensor]:
        with opened(tmp_path / kind, parallel=kind, global_batch=global_batch, micro_batch=4) as run:
            model = run.parallelize(Experts())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(2):
                for x, y in step.micro_batches(data):
                    number = int(step._index >= global_batch // 4 // 2)  # as the ranks have them
                    step.backward(nn.functional.cross_entropy(model(x, number)[0], y, reduction="sum"), count=len(y))
                step.update(optimizer)
            return {
                name: part.full_tensor() if isinstance(part, DTensor) else part  # all ranks must reach it
                for name, part in model.state_dict().items()
            }

    (alone,) = in_world(1, partial(work, kind="none"))
    for found in in_world(2, partial(work, kind="fsdp")):
        for name, whole in alone.items():
            assert torch.allclose(found[name], whole, atol=1e-6), name


class Blocks(nn.Module):
    """Blocks of one size, of which a forward pass may leave one out. Its input is another one after it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.out = nn.Linear(7, 5)
        with torch.no_grad():  # as if other ranks had made theirs by chance
            for number, parameter in enumerate(self.parameters()):
                parameter.fill_(0.1 * number + rank)

    def forward(self, x: torch.Tensor, without: int = -1) -> torch.Tensor:
        x -= 0.5
        for number, block in enumerate(self.blocks):
            x = x if number == without else torch.tanh(block(x))
        out: torch.Tensor = self.out(x)
        return out


def blocks_trained(folder: Path, kind: str, without: Callable[[int], int]) -> list[float]:
    """The losses. :param without: which block each micro-batch of a step leaves out."""
    with opened(folder, parallel=kind, global_batch=16, micro_batch=2) as run:
        model = run.parallelize(Blocks(run.rank))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = run.data(samples())
        run.track(model=model, optimizer=optimizer)
        losses = []
        for step in run.steps(3):
            for x, y in step.micro_batches(data):
                out = model(x, without(step._index))
                step.backward(nn.functional.cross_entropy(out, y, reduction="sum"), count=len(y))
            step.update(optimizer)
            losses.append(step.loss)
        return losses


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3)])
def test_all_ranks_begin_with_the_weights_of_the_first_and_a_model_may_write_into_its_input(
    tmp_path: Path, kind: str, ranks: int
) -> None:
    """With three ranks, some of them make a spare pass over an input that they use as well."""
    (alone,) = in_world(1, lambda rank: blocks_trained(tmp_path / "none", "none", lambda index: -1))
    for losses in in_world(ranks, lambda rank: blocks_trained(tmp_path / kind, kind, lambda index: -1)):
        assert losses == pytest.approx(alone, rel=1e-6)


def test_sharded_blocks_that_ranks_take_in_other_orders_are_refused(tmp_path: Path) -> None:
    """The last micro-batch of each rank takes all of them."""

    def without(index: int) -> int:
        return -1 if index in (3, 7) else (index + index // 4) % 3

    for error in errors(2, lambda rank: blocks_trained(tmp_path, "fsdp", without)):
        assert isinstance(error, UsageError)
        assert "step 1: the forward passes of rank 1 took other blocks of the model than those of rank 0" in str(error)


def test_a_frozen_model_is_that_of_the_first_rank(tmp_path: Path) -> None:
    def work(rank: int) -> float:
        with opened(tmp_path) as run:
            model = run.parallelize(Blocks(rank).requires_grad_(False))
            return float(sum(parameter.sum() for parameter in model.parameters()))

    first, second = in_world(2, work)
    assert first == second


class Heads(nn.Module):
    """Two heads of one size, each a unit of its own under FSDP. The loss takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.heads = nn.ModuleList([nn.Linear(7, 5), nn.Linear(7, 5)])

    def forward(self, x: torch.Tensor, head: int, *, both: bool) -> torch.Tensor:
        x = self.first(x)
        out = {number: one(x) for number, one in enumerate(self.heads) if both or number == head}
        chosen: torch.Tensor = out[head]
        return chosen


@pytest.mark.parametrize(("both", "of_each_rank"), [(True, False), (False, False), (False, True)])
def test_a_sharded_block_that_a_loss_does_not_depend_on_is_refused(
    tmp_path: Path, both: bool, of_each_rank: bool
) -> None:
    """Whether each rank takes a head of its own, or all take one first and then the other: whatever happened before."""

    def work(rank: int) -> None:
        with opened(tmp_path, parallel="fsdp") as run:
            model = run.parallelize(Heads())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            with torch.no_grad():  # both heads were gathered once
                model(torch.ones(1, 7), 0, both=True)
            for step in run.steps(2):
                for x, y in step.micro_batches(data):
                    out = model(x, rank if of_each_rank else step._index % 2, both=both)
                    step.backward(nn.functional.cross_entropy(out, y, reduction="sum"), count=len(y))
                step.update(optimizer)

    found = errors(2, work)
    missed = (1, 0) if of_each_rank else (0, 0)  # the last of a rank's two micro-batches takes head 1
    for head, error in zip(missed, found, strict=True):
        assert f"the backward pass didn't come to heads.{head}, and under FSDP" in str(error)


def test_a_spare_pass_through_a_model_that_returns_an_object_is_refused(tmp_path: Path) -> None:
    @dataclass
    class Output:
        logits: torch.Tensor

    class Wrapping(Blocks):
        def forward(self, x: torch.Tensor, without: int = -1) -> Output:  # type: ignore[override]
            return Output(super().forward(x, without))

    def work(rank: int) -> None:
        with opened(tmp_path, parallel="fsdp", global_batch=10, micro_batch=2) as run:
            model = run.parallelize(Wrapping(0))
            data = run.data(samples())
            run.track(model=model)
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).logits.sum(), count=1)

    found = [error for error in errors(3, work) if isinstance(error, UsageError)]  # the others lose their peers
    assert found
    assert all("the model returns a " in str(error) and "Output, in which no tensor" in str(error) for error in found)


Body = Callable[[dtrain.Run, nn.Module, dtrain.EMA, torch.Tensor], None]


def losses(
    root: Path,
    kind: str,
    after_backward: Body = lambda *_: None,
    after_update: Body = lambda *_: None,
    made: Callable[[], nn.Module] = Net,
    **options: Any,
) -> list[float]:
    """Of four steps. All ranks must reach it."""
    with opened(root, parallel=kind, snapshot_every=1000, **options) as run:
        model = run.parallelize(made())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = run.data(samples())
        average = dtrain.EMA(model, optimizer, decay=0.5)
        run.track(model=model, optimizer=optimizer, average=average)
        found = []
        for step in run.steps(4):
            for x, y in step.micro_batches(data):
                out = model(x)
                out = out[0] if isinstance(out, tuple) else out
                step.backward(nn.functional.cross_entropy(out.float(), y, reduction="sum"), count=len(y))
                after_backward(run, model, average, x)
            step.update(optimizer)
            after_update(run, model, average, x)
            found.append(step.loss)
        return found


def alone(root: Path, *, rel: float = 1e-5, **options: Any) -> Any:
    """Those of one process."""
    return pytest.approx(in_world(1, lambda rank: losses(root / "alone", "none", **options))[0], rel=rel)


def averaged(run: dtrain.Run, model: nn.Module, average: dtrain.EMA, x: torch.Tensor) -> None:
    with average.applied():
        model(x)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "bodies", [{"after_backward": lambda run, model, average, x: model(x)}, {"after_update": averaged}]
)
def test_a_pass_without_a_backward_pass_leaves_no_old_weights_behind(
    tmp_path: Path, bodies: dict[str, Any], ranks: int
) -> None:
    """An accuracy that is taken without no_grad: FSDP2 keeps what it gathers for a backward pass that may come."""
    right = alone(tmp_path)
    for found in in_world(ranks, lambda rank: losses(tmp_path / "sharded", "fsdp", **bodies)):
        assert found == right


@pytest.mark.parametrize("count", [12, 13])
def test_validation_without_no_grad_changes_nothing(tmp_path: Path, count: int) -> None:
    """Also where a rank makes a spare pass: 7 batches on 2 ranks."""

    def validate(run: dtrain.Run, model: nn.Module, average: dtrain.EMA, x: torch.Tensor) -> None:
        for inputs, _ in run.once(Subset(samples(), range(count))):
            model(inputs)

    right = alone(tmp_path)
    for found in in_world(2, lambda rank: losses(tmp_path / "sharded", "fsdp", after_update=validate)):
        assert found == right


def test_a_second_pass_behind_the_backward_pass_is_refused_where_ranks_could_not_keep_step(tmp_path: Path) -> None:
    def again(run: dtrain.Run, model: nn.Module, average: dtrain.EMA, x: torch.Tensor) -> None:
        with torch.no_grad():
            model(x)

    def work(rank: int) -> None:
        losses(tmp_path, "fsdp", again, global_batch=10, micro_batch=2)

    found = [error for error in errors(3, work) if isinstance(error, UsageError)]  # the others lose their peers
    assert found
    assert all("the model was called twice for one micro-batch" in str(error) for error in found)


def test_a_pass_behind_the_last_backward_pass_is_one_of_all_ranks(tmp_path: Path) -> None:
    def measure(run: dtrain.Run, model: nn.Module, average: dtrain.EMA, x: torch.Tensor) -> None:
        with torch.no_grad():
            model(x)
        run.evaluate(model, Subset(samples(), range(13)), dtrain.Mean(nn.functional.cross_entropy))

    options: dict[str, Any] = {"global_batch": 10, "micro_batch": 2}
    right = alone(tmp_path, **options)
    for found in in_world(3, lambda rank: losses(tmp_path / "sharded", "fsdp", after_update=measure, **options)):
        assert found == right


class Noted(nn.Module):
    """Returns, for the log, what has no gradient where it is: the root of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.net(x)
        return out, (out - out.detach()).square().sum().sqrt()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_output_without_a_gradient_that_no_loss_uses_spoils_none(tmp_path: Path, precision: str) -> None:
    """A rank that makes a spare pass can't tell which outputs the loss uses."""
    options: dict[str, Any] = {"global_batch": 10, "micro_batch": 2, "precision": precision, "made": Noted}
    right = alone(tmp_path, rel=1e-5 if precision == "fp32" else 3e-2, **options)
    for found in in_world(2, lambda rank: losses(tmp_path / "sharded", "fsdp", **options)):
        assert found == right


@pytest.mark.parametrize("reduction", ["fast", "exact"])
@pytest.mark.parametrize("part", ["first", "blocks"])
@pytest.mark.parametrize("at_first", [True, False])
def test_what_is_frozen_or_unfrozen_after_parallelize_is_refused(
    tmp_path: Path, reduction: str, part: str, at_first: bool
) -> None:
    def work(rank: int) -> None:
        def toggled(run: dtrain.Run, model: nn.Module, average: dtrain.EMA, x: torch.Tensor) -> None:
            model.get_submodule(part).requires_grad_(not at_first)

        def made() -> nn.Module:
            net = Net()
            net.get_submodule(part).requires_grad_(at_first)
            return net

        losses(tmp_path, "fsdp", after_update=toggled, made=made, reduction=reduction)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert "other parameters of the model require a gradient" in str(error)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_head_that_is_added_after_parallelize_is_refused(tmp_path: Path, kind: str) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel=kind) as run:
            bare = Net()
            model = run.parallelize(bare)
            bare.last = nn.Linear(WIDTH, CLASSES)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                for x, y in step.micro_batches(data):
                    # The old one has left the model, and DDP and FSDP wait for its gradient as well.
                    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
                    step.backward(loss, count=len(y))
                step.update(optimizer)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert re.search("added or unfrozen since|without a gradient", str(error))
