"""Low precision: where it holds, and what of it has to be saved and agreed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

import dtrain
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.state import bare
from dtrain.errors import Garbage, UsageError
from tests.layers import FEATURES, Net, digest_of, samples
from tests.training import opened
from tests.world import errors, in_world


def train(root: Path, steps: int, *, huge: int = 0, **options: Any) -> list[tuple[float, str]]:
    """Of each step, the scale of its losses and the weights after it. All ranks must reach it.

    :param huge: the step in which the first sample of the list makes the gradients overflow.
    """
    found = []
    with opened(root, global_batch=8, micro_batch=2, precision="fp16", **options) as run:
        model = run.parallelize(Net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        data = run.data(samples())
        run.track(model=model, optimizer=optimizer)
        scaler = run.scaler
        assert scaler is not None
        for step in run.steps(steps):
            scale = scaler.get_scale()
            for number, (x, y) in enumerate(step.micro_batches(data)):
                loss = F.cross_entropy(model(x).float(), y, reduction="sum")
                if step.number == huge and run.is_first and number == 0:
                    loss = loss * 1e30
                step.backward(loss, count=len(y))
            step.update(optimizer, clip=1.0)
            found.append((scale, digest_of(bare(model))))
    return found


@pytest.mark.parametrize(("kind", "ranks"), [("none", 1), ("ddp", 3), ("fsdp", 3), ("hsdp", 4)])
def test_an_overflow_on_one_rank_is_a_step_that_all_ranks_leave_out(tmp_path: Path, kind: str, ranks: int) -> None:
    """Its gradients are infinite on the ranks that hold that part of the model, or on all."""
    for found in in_world(ranks, lambda rank: train(tmp_path, 3, huge=2, parallel=kind)):
        scales, weights = zip(*found, strict=True)
        assert scales == (1024.0, 1024.0, 512.0)
        assert weights[1] == weights[0], "the step was left out"
        assert weights[2] != weights[1]


def test_the_scale_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    def whole(rank: int) -> list[tuple[float, str]]:
        return train(tmp_path / "whole", 5, huge=2)

    def first(rank: int) -> list[tuple[float, str]]:
        return train(tmp_path / "cut", 3, huge=2)

    def second(rank: int) -> list[tuple[float, str]]:
        return train(tmp_path / "cut", 5)

    undisturbed = in_world(2, whole)[0]
    assert in_world(2, first)[0] == undisturbed[:3]
    assert in_world(2, second)[0] == undisturbed[3:]
    assert undisturbed[-1][0] == 512.0


def test_a_scaler_of_the_users_own_is_used(tmp_path: Path) -> None:
    def work(rank: int) -> float:
        with opened(tmp_path, precision="fp16") as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            scaler = GradScaler("cpu", init_scale=64.0, growth_interval=1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer, mine=scaler)
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).float().sum(), count=len(x))
                step.update(optimizer)
            return scaler.get_scale()

    assert in_world(1, work) == [128.0]


def test_a_scaler_that_is_switched_off_is_none(tmp_path: Path) -> None:
    def work(rank: int) -> bool:
        with opened(tmp_path) as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer, scaler=GradScaler("cpu", enabled=False))
            for step in run.steps(2):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).sum() * (torch.nan if step.number == 2 else 1), count=len(x))
                step.update(optimizer)
        return True

    (error,) = errors(1, work)
    assert isinstance(error, Garbage), "a gradient that isn't finite is looked for all the same"


def test_fp16_with_a_scaler_that_is_switched_off_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, precision="fp16") as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            run.track(model=model, scaler=GradScaler("cpu", enabled=False))
            run.data(samples())
            with pytest.raises(UsageError, match=r"track\(scaler=\.\.\.\): this GradScaler is switched off"):
                next(iter(run.steps(2)))

    in_world(1, work)


def test_an_overflow_that_one_rank_of_a_tensor_sees_is_one_of_all(tmp_path: Path) -> None:
    def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return parallelize_module(model, mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, 4)  # not spread over the tensor's ranks
            self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.narrow(self.wide(self.first(x))).clone()
            return out

    def work(rank: int) -> tuple[float, bool]:
        with opened(tmp_path, precision="fp16", parallel="fsdp", tensor_parallel=2) as run:
            model = run.parallelize(Two(), tensor_parallel=split)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            before = [local_part(p).detach().clone() for p in model.parameters()]
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).float().sum(), count=len(x))
                gradient = model.get_submodule("wide").weight.grad
                if rank == 3:
                    local_part(gradient).fill_(torch.inf)  # type: ignore[arg-type]
                step.update(optimizer)
            after = [local_part(p).detach() for p in model.parameters()]
            assert run.scaler is not None
            return run.scaler.get_scale(), all(map(torch.equal, before, after))

    assert in_world(4, work) == [(512.0, True)] * 4


def test_a_loss_in_float16_is_refused_before_it_overflows(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, precision="fp16") as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            data = run.data(samples())
            run.track(model=model)
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).sum(), count=len(x))

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert "the loss is a sum in float16, which ends at 65,504; compute it in float32" in str(error)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_loop_and_what_is_asked_for_compute_in_the_precision_and_nothing_else_does(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            during_backward.append(torch.is_autocast_enabled("cpu"))
            return gradients[0]

    during_backward: list[bool] = []

    def work(rank: int) -> None:
        low = dtype != torch.float32
        with opened(tmp_path, precision=precision) as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                for x, _ in step.micro_batches(data):
                    assert model(x).dtype == dtype
                    watched: torch.Tensor = Watched.apply(model(x))  # type: ignore[no-untyped-call]
                    step.backward(watched.float().sum(), count=len(x))
                assert not torch.is_autocast_enabled("cpu")
                step.update(optimizer)
            with run.autocast():
                assert torch.is_autocast_enabled("cpu") == low
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert during_backward == [False] * 4

    in_world(1, work)


@pytest.mark.parametrize(("tf32", "expected"), [(False, "highest"), (True, "high")])
def test_tf32_is_a_switch(tmp_path: Path, tf32: bool, expected: str) -> None:
    def work(rank: int) -> str:
        with opened(tmp_path, tf32=tf32):
            return torch.get_float32_matmul_precision()

    assert in_world(1, work) == [expected]


def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path: Path) -> None:
    def begin(rank: int) -> None:
        with opened(tmp_path, precision="bf16", reduction="exact"):
            pass

    def again(rank: int) -> None:
        with opened(tmp_path):
            pass

    in_world(1, begin)
    (error,) = errors(1, again)
    assert isinstance(error, dtrain.errors.ConfigError)
    assert "precision was 'bf16', is now 'fp32'; reduction was 'exact', is now 'fast'" in str(error)


def test_data_of_a_type_that_is_not_float_is_left_alone(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, precision="bf16", parallel="fsdp") as run:
            model = run.parallelize(nn.Embedding(4, 3))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(TensorDataset(torch.arange(40) % 4))
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(2):
                for (x,) in step.micro_batches(data):
                    step.backward(model(x).float().sum(), count=len(x))
                step.update(optimizer)

    in_world(2, work)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_has_overflowed_moves_neither_schedule_nor_average(tmp_path: Path, fused: bool) -> None:
    """A fused optimizer is called for it all the same, and finds out by itself."""

    def work(rank: int) -> list[tuple[float, str, str]]:
        found = []
        with opened(tmp_path, precision="fp16") as run:
            model = run.parallelize(Net())
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            ema = dtrain.EMA(model, optimizer, decay=0.5)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer, schedule=schedule, ema=ema)
            for step in run.steps(3):
                for x, y in step.micro_batches(data):
                    loss = F.cross_entropy(model(x).float(), y, reduction="sum") * (1e30 if step.number == 2 else 1)
                    step.backward(loss, count=len(y))
                step.update(optimizer, schedule)
                found.append((optimizer.param_groups[0]["lr"], digest_of(bare(model)), digest_of(ema)))
        return found

    first, second, third = in_world(1, work)[0]
    assert second == first
    assert third[0] == 0.025
    assert third[1:] != first[1:]
