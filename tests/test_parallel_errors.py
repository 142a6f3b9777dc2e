"""What can't be spread over ranks, or would come to different results on different numbers of them, is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dtrain
from dtrain.errors import ConfigError, UsageError
from tests.layers import WIDTH, Net, samples
from tests.training import opened
from tests.world import errors, in_world


def test_two_sharded_models_need_blocks_of_equal_length(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel="fsdp", global_batch=10, micro_batch=2) as run:
            models = [run.parallelize(Net()) for _ in range(2)]
            data = run.data(samples())
            run.track(first=models[0], second=models[1])
            for step in run.steps(1):
                for x, y in step.micro_batches(data):
                    step.backward(sum(model(x).sum() for model in models), count=len(y))

    for error in errors(3, work):
        assert isinstance(error, UsageError)
        assert "5 micro-batches on 3 ranks" in str(error)


def test_a_meta_parameter_that_nobody_can_fill_is_named(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3))

    def work(rank: int) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3), Scale())
        with opened(tmp_path) as run:
            run.parallelize(model)

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert str(error).startswith("1.scale was made on the meta device, and no reset_parameters has filled it")


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"parallel": "none"}, 2, "parallel='none' is for one process, and 2 were started"),
        ({"parallel": "fsdp", "tensor_parallel": 2}, 3, "doesn't divide 3 ranks; start a multiple of 2"),
    ],
)
def test_ranks_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, Any], ranks: int, message: str) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, **options):
            pass

    for error in errors(ranks, work):
        assert isinstance(error, ConfigError)
        assert message in str(error)


def test_recomputing_a_model_without_blocks_says_what_to_do(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, activation_checkpointing="full") as run:
            run.parallelize(nn.Linear(3, 3))

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert "no module of this Linear is repeated in a list; name its blocks" in str(error)


@pytest.mark.parametrize(
    "options", [{"parallel": "ddp"}, {"parallel": "ddp", "reduction": "exact"}, {"parallel": "fsdp"}]
)
def test_a_rank_whose_last_loss_does_not_reach_the_model_stops_the_run(tmp_path: Path, options: dict[str, Any]) -> None:
    """A micro-batch that is all padding, for instance: DDP would exchange nothing, and say nothing."""

    def work(rank: int) -> None:
        with opened(tmp_path, **options) as run:
            model = run.parallelize(Net())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(2):
                for number, (x, _) in enumerate(step.micro_batches(data)):
                    loss = model(x).sum() if number == 0 else torch.zeros((), requires_grad=True)
                    step.backward(loss, count=1)
                step.update(optimizer)

    expected = "didn't come to blocks.0, blocks.1" if options["parallel"] == "fsdp" else "without a gradient"
    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert expected in str(error)


@pytest.mark.parametrize(("kind", "ranks"), [("none", 1), ("fsdp", 1), ("fsdp", 2)])
def test_exact_sums_need_a_gradient_of_every_parameter_in_every_micro_batch(
    tmp_path: Path, kind: str, ranks: int
) -> None:
    """Two layers of one size that take turns could be taken for each other."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)

        def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
            out: torch.Tensor = (self.a, self.b)[number % 2](x)
            return out

    def work(rank: int) -> None:
        with opened(tmp_path, parallel=kind, reduction="exact") as run:
            model = run.parallelize(Experts())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                for number, (x, _) in enumerate(step.micro_batches(data)):
                    step.backward(model(x, number).sum(), count=1)

    for error in errors(ranks, work):
        assert isinstance(error, UsageError)
        assert "micro-batch" in str(error)
        assert "reduction='exact' needs one of each in every micro-batch" in str(error)


@pytest.mark.parametrize(
    ("tracked", "message"),
    [
        (("model",), "given a SGD that isn't tracked"),
        (("model", "optimizer"), "given a LambdaLR that isn't tracked"),
        (("optimizer", "schedule"), "give its module to run.track"),
        ((), "given a SGD that isn't tracked"),
        (("model", "optimizer", "schedule"), "given an optimizer whose EMA isn't tracked"),
    ],
)
def test_what_would_begin_anew_after_a_failure_is_refused(
    tmp_path: Path, tracked: tuple[str, ...], message: str
) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            model = run.parallelize(Net())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            data = run.data(samples())
            objects = {"model": model, "optimizer": optimizer, "schedule": schedule}
            dtrain.EMA(model, optimizer)
            run.track(**{name: objects[name] for name in tracked})
            for step in run.steps(2):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).sum(), count=1)
                step.update(optimizer, schedule)

    (error,) = errors(1, work)
    assert message in str(error)


@pytest.mark.parametrize("what", ["a head of its own", "unfrozen later"])
def test_what_the_ranks_would_train_apart_is_refused(tmp_path: Path, what: str) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            bare, head = Net(), nn.Linear(5, 1)
            bare.first.requires_grad_(what != "unfrozen later")
            model = run.parallelize(bare)
            parameters = [*model.parameters()] + ([*head.parameters()] if what == "a head of its own" else [])
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            data = run.data(samples())
            run.track(model=model, head=head, optimizer=optimizer)
            for step in run.steps(2):
                if step.number == 2:
                    bare.requires_grad_(True)
                for x, _ in step.micro_batches(data):
                    step.backward(head(model(x)).sum(), count=1)
                step.update(optimizer)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert re.search("of no model that was given to run.parallelize|freeze or unfreeze them before", str(error))


def test_a_model_that_is_called_twice_is_refused_where_ranks_could_not_keep_step(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel="fsdp", global_batch=10, micro_batch=2) as run:
            model = run.parallelize(Net())
            data = run.data(samples())
            run.track(model=model)
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    step.backward((model(x) + model(2 * x)).sum(), count=1)

    found = [error for error in errors(3, work) if isinstance(error, UsageError)]  # the others lose their peers
    assert found
    assert all("the model was called twice for one micro-batch" in str(error) for error in found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.complex64, torch.bfloat16])
def test_a_buffer_of_any_type_that_is_filled_is_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(4, dtype=dtype))

        def reset_parameters(self) -> None:
            self.get_buffer("table").fill_(1)

    def work(rank: int) -> bool:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 3), Table())
        with opened(tmp_path) as run:
            run.parallelize(model)
        return torch.equal(model[1].get_buffer("table"), torch.ones(4, dtype=dtype))

    assert in_world(1, work) == [True]


def test_a_reset_that_reaches_into_sharded_blocks_is_refused(tmp_path: Path) -> None:
    class Resets(Net):
        def reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def work(rank: int) -> None:
        with torch.device("meta"):
            model = Resets()
        with opened(tmp_path, parallel="fsdp") as run:
            run.parallelize(model)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert "changes the blocks, which are sharded by then" in str(error)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("blocks.1.wide", "blocks 0 and 1 share a parameter (wide.weight): they can't be sharded apart"),
        ("head", "block 0 shares a parameter (weight of a Linear) with what is around the blocks"),
    ],
)
def test_blocks_that_share_a_parameter_can_not_be_sharded_apart(tmp_path: Path, other: str, message: str) -> None:
    def work(rank: int) -> None:
        model = Net()
        model.head = nn.Linear(WIDTH, 2 * WIDTH + 1)
        model.get_submodule(other).weight = model.blocks[0].get_submodule("wide").weight
        with opened(tmp_path, parallel="fsdp") as run:
            run.parallelize(model)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert message in str(error)


def test_batch_norm_over_all_ranks_needs_as_many_passes_on_each(tmp_path: Path) -> None:
    def work(rank: int, micro_batches: int) -> None:
        options: dict[str, Any] = {"parallel": "fsdp", "global_batch": 2 * micro_batches, "micro_batch": 2}
        with opened(tmp_path / str(micro_batches), **options) as run:
            run.parallelize(nn.Sequential(nn.Linear(7, 5), nn.SyncBatchNorm(5)))

    for error in errors(2, lambda rank: work(rank, 3)):
        assert isinstance(error, UsageError)
        assert "1 is a SyncBatchNorm, and 3 micro-batches can't be shared out evenly over 2 ranks" in str(error)
    in_world(2, lambda rank: work(rank, 4))


@pytest.mark.parametrize(("kind", "ranks"), [("none", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_buffer_that_was_expanded_is_one_like_any_other(tmp_path: Path, kind: str, ranks: int) -> None:
    def work(rank: int) -> list[list[float]]:
        with opened(tmp_path, parallel=kind) as run:
            bare = Net()
            bare.register_buffer("table", torch.full((3,), float(rank)).expand(2, 3), persistent=False)
            bare.register_buffer("kept", torch.full((3,), float(rank)).expand(2, 3))
            model = run.parallelize(bare)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(2):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).sum(), count=1)
                step.update(optimizer)
            assert "table" not in bare.state_dict()
            return [bare.get_buffer(name).flatten().tolist() for name in ("table", "kept")]

    assert in_world(ranks, work) == [[[0.0] * 6] * 2] * ranks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint32])
def test_a_meta_buffer_of_a_type_without_a_sign_that_nobody_fills_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    """As a causal mask of zeros it would mask nothing."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("mask", torch.ones(3, 3).tril().to(dtype))

    def work(rank: int) -> None:
        with torch.device("meta"):
            model = Masked()
        with opened(tmp_path) as run:
            run.parallelize(model)

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert str(error).startswith("mask was made on the meta device, and no reset_parameters has filled it")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_buffer_that_its_reset_replaces_is_taken(tmp_path: Path, kind: str) -> None:
    class Rotary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.angles: torch.Tensor
            self.mask: torch.Tensor
            self.register_buffer("none", torch.empty(0, dtype=torch.bool))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            self.register_buffer("angles", torch.arange(4.0) / 4, persistent=False)
            self.mask = nn.Buffer(torch.ones(2, 2, dtype=torch.bool).tril())

    def work(rank: int) -> tuple[list[float], list[list[bool]]]:
        with torch.device("meta"):
            model = Rotary()
        with opened(tmp_path / kind, parallel=kind) as run:
            run.parallelize(model)
        return model.angles.tolist(), model.mask.tolist()

    assert in_world(2, work) == [([0.0, 0.25, 0.5, 0.75], [[True, False], [True, True]])] * 2
