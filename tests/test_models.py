"""Models of all kinds in a run of two ranks: unused parameters, buffers that are trained, loops that are left early."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.errors import DataError, UsageError
from tests.layers import digest_of
from tests.training import built, dataset, opened, unwrapped
from tests.world import alone, errors, in_world


class PartlyUsed(nn.Module):
    def __init__(self, unused: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.unused = unused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x if index == self.unused else layer(x)
        return x


class Codebook(nn.Module):
    """Has no parameter, and a buffer that every forward pass changes by the rank's own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.get_buffer("mean")
        mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - mean


@pytest.mark.parametrize("unused", [0, 2])
def test_a_parameter_without_a_gradient_stops_the_run_before_it_is_used(tmp_path: Path, unused: int) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, save_every=1) as run:
            model = run.parallelize(PartlyUsed(unused))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(dataset())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(3):
                for x, ids in step.micro_batches(data):
                    step.backward(model(x).sum(), count=len(ids))
                step.update(optimizer)

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert "step 1: the last backward pass left some of the model's parameters without a gradient" in str(error)
    assert not (tmp_path / "checkpoints").exists()


def _ignoring_rank(work: Callable[[int], list[list[float]]], every: int, rank: int) -> list[list[float]]:
    return work(every)


def test_buffers_that_training_changes_do_not_depend_on_when_it_is_saved(tmp_path: Path) -> None:
    def work(save_every: int) -> list[list[float]]:
        with opened(tmp_path / str(save_every), save_every=save_every) as run:
            codebook = run.parallelize(Codebook())
            model = run.parallelize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            data = run.data(dataset())
            run.track(model=model, optimizer=optimizer, codebook=codebook)
            for step in run.steps(6):
                for x, ids in step.micro_batches(data):
                    step.backward(model(codebook(x)).square().sum(), count=len(ids))
                step.update(optimizer)
        tensors = [*unwrapped(model).state_dict().values(), codebook.get_buffer("mean")]
        return [tensor.tolist() for tensor in tensors]

    results = [in_world(2, partial(_ignoring_rank, work, every)) for every in (1, 4, 100)]
    for result in results:
        assert result == [results[0][0]] * 2


def test_a_loop_that_is_left_in_the_middle_of_a_step_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    def work() -> None:
        with opened(tmp_path, save_every=2) as run:
            model, _, data = built(run)
            for step in run.steps(5):
                for x, ids in step.micro_batches(data):
                    step.backward(model(x).sum(), count=len(ids))
                    if step.number == 4:
                        break
                if step.number == 4:
                    break
                step.update(run._state.objects["optimizer"])

    alone(work)
    assert [path.name[:13] for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_save_before_the_loop_is_refused(tmp_path: Path) -> None:
    def work() -> None:
        with opened(tmp_path) as run:
            built(run)
            run.save()

    (error,) = errors(1, lambda rank: work())
    assert isinstance(error, UsageError)
    assert "save comes after run.steps has begun" in str(error)


def test_ranks_with_different_data_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            built(run, samples=40 + rank)
            next(iter(run.steps(1)))

    for error in errors(2, work):
        assert isinstance(error, DataError)
        assert "the data of rank 1 is not that of rank 0" in str(error)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64).t())
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).abs() + self.bias


def test_complex_parameters_have_exact_sums_too(tmp_path: Path) -> None:
    def work(rank: int, ranks: int) -> str:
        with opened(tmp_path / str(ranks), reduction="exact") as run:
            model = run.parallelize(Complex())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            data = run.data(dataset())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(3):
                for x, ids in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(ids))
                norms = [torch.linalg.vector_norm(p.grad).float() for p in model.parameters() if p.grad is not None]
                whole = torch.linalg.vector_norm(torch.stack(norms))
                step.update(optimizer, clip=0.1)
                assert step.gradient_norm == pytest.approx(float(whole) / step.totals.count, rel=1e-5)
        return digest_of(unwrapped(model))

    assert len({digest for ranks in (1, 2, 3) for digest in in_world(ranks, partial(work, ranks=ranks))}) == 1
