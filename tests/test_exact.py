"""With `reduction="exact"`, the number of ranks leaves no trace in the weights: not in one bit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dtrain.training.exactness import ELEMENTWISE, name_changed_buffers
from dtrain.training.norm import exact_norm
from dtrain.training.order import block
from dtrain.training.reduce import Pending, Sums, spans
from tests import evidence, kills
from tests.jobs import start
from tests.layers import Block, Net, curve, samples
from tests.train_job import Options
from tests.training import opened
from tests.world import errors, in_world

STEPS = 50
LAYOUTS = [("none", 1), *(("ddp", n) for n in (2, 3, 4)), *(("fsdp", n) for n in (1, 2, 3, 4)), ("hsdp", 4)]


def of(kind: str) -> dict[str, Any]:
    return {"parallel": kind, "shard_size": 2 if kind == "hsdp" else None}


def test_fifty_steps_have_one_sha256_on_any_number_of_ranks_in_any_layout(tmp_path: Path) -> None:
    """Six micro-batches: blocks of 3, of 2, and of 1, 2, 1, 2; dropout, AdamW and clipping."""

    def work(rank: int, kind: str, ranks: int) -> tuple[list[float], list[float], str]:
        found = curve(tmp_path / f"{kind}-{ranks}", STEPS, reduction="exact", **of(kind))
        return found.losses, found.norms, found.digest

    results = {
        place: found for place in LAYOUTS for found in in_world(place[1], partial(work, kind=place[0], ranks=place[1]))
    }
    right = results["none", 1]
    assert [place for place, found in results.items() if found != right] == []
    fast = in_world(3, lambda rank: curve(tmp_path / "fast", STEPS))[0]
    assert fast.digest != right[2], "else this would show nothing"
    assert fast.losses == pytest.approx(right[0], rel=1e-3)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16", "activation_checkpointing": "full"}])
def test_low_precision_has_the_same_bits_on_any_number_of_ranks_of_a_layout(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    def work(rank: int, kind: str, ranks: int) -> str:
        return curve(tmp_path / f"{kind}-{ranks}", 6, reduction="exact", **of(kind), **options).digest

    for kind in ("ddp", "fsdp"):
        found = {in_world(ranks, partial(work, kind=kind, ranks=ranks))[0] for ranks in (1, 3, 4)}
        assert len(found) == 1, kind


def test_a_run_that_is_killed_and_resized_four_times_has_the_bits_of_the_undisturbed_one(tmp_path: Path) -> None:
    """4, 2, 3, 1 and 4 ranks, by FSDP and by DDP in turn: at each change all processes get a SIGKILL."""

    def options(name: str, kind: Literal["ddp", "fsdp"]) -> Options:
        run, seen = str(tmp_path / name), str(tmp_path / f"{name}-evidence")
        return Options(run=run, evidence=seen, steps=STEPS, parallel=kind, reduction="exact", step_s=0.0, save_every=3)

    with start(options("undisturbed", "ddp"), 0) as job:
        assert job.wait() == 0, job.tail()
        undisturbed = evidence.of_run(job.options)
    lives: list[tuple[int, Literal["ddp", "fsdp"]]] = [(4, "fsdp"), (2, "ddp"), (3, "fsdp"), (1, "ddp")]
    for ranks, kind in lives:
        with start(options("killed", kind), ranks) as job:
            job.until_new_steps(4)
            if ranks == 3:
                kills.trainers(job, random.Random(31))
                job.until_new_steps(1)
            job.kill_all()
    with start(options("killed", "fsdp"), 4) as job:
        assert job.wait() == 0, job.tail()
        found = evidence.of_run(job.options)
        evidence.assert_nothing_left(job.options)
    assert found.ids == undisturbed.ids
    assert found.losses == undisturbed.losses
    for name in ("parameters", "optimizer", "schedule"):
        assert {digests[name] for digests in found.digests.values()} == {undisturbed.digests[0][name]}


def tree_of(leaves: list[torch.Tensor]) -> torch.Tensor:
    """The sum in the order that was promised, from the root down."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return tree_of(leaves[:half]) + tree_of(leaves[half:])


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 24, 33])
def test_sums_follow_the_tree_however_the_list_is_cut(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    leaves = [torch.randn(64, generator=generator) for _ in range(length)]
    expected = tree_of(leaves)
    for world_size in range(1, min(length, 9) + 1):
        sums = Sums(length)
        for rank in range(world_size):
            mine = Sums(length)
            for leaf in block(length, rank, world_size):
                mine.add(leaf, leaf + 1, [leaves[leaf].clone()])
            assert [(node.first, node.end) for node in mine.nodes] == spans(length, block(length, rank, world_size))
            assert len(mine.nodes) <= 2 * length.bit_length()
            for node in mine.nodes:
                sums.add(*node)
        assert torch.equal(sums.total()[0], expected), f"{world_size} ranks"


@pytest.mark.parametrize(("shards", "ranks", "numel"), [(1, 3, 10), (3, 3, 12), (2, 4, 14), (4, 4, 8), (1, 4, 2)])
def test_each_rank_gets_its_segment_of_the_sum(shards: int, ranks: int, numel: int) -> None:
    length = 7
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(numel, generator=generator) for _ in range(length)]

    def work(rank: int) -> torch.Tensor:
        sums = Sums(length)
        for leaf in block(length, rank, ranks):
            sums.add(leaf, leaf + 1, [leaves[leaf].clone()])
        return Pending([node.parts[0] for node in sums.nodes], length, shards).segment()

    segments = in_world(ranks, work)
    replicas = ranks // shards
    parts = [torch.cat([segments[r * shards + s] for r in range(replicas)])[: numel // shards] for s in range(shards)]
    assert torch.equal(torch.cat(parts), tree_of(leaves))


def pieces() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    for shape, scale in (((33, 7), 1.0), ((5,), 1e-30), ((64, 3, 3), 1e20), ((1,), 3.0), ((129, 2), 1e-44)):
        yield torch.randn(shape, generator=generator) * scale


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_the_exact_norm_is_the_same_on_any_mesh_and_near_the_true_one(count: int) -> None:
    """:param count: how many tensors, of sizes more and more apart."""
    gradients = list(pieces())[:count]
    true = math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients))

    def work(rank: int, ranks: int) -> list[float]:
        found = [float(exact_norm(gradients))]
        mesh = init_device_mesh("cpu", (ranks,))
        found.append(float(exact_norm([distribute_tensor(g, mesh, [Shard(0)]) for g in gradients])))
        if ranks == 4:
            square = init_device_mesh("cpu", (2, 2))
            found.append(float(exact_norm([distribute_tensor(g, square, [Replicate(), Shard(0)]) for g in gradients])))
        return found

    found = {norm for ranks in (1, 2, 3, 4) for norms in in_world(ranks, partial(work, ranks=ranks)) for norm in norms}
    assert len(found) == 1
    assert found.pop() == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_exact_norm_of_what_is_not_finite_on_one_rank_is_nan_on_all(bad: float) -> None:
    def work(rank: int) -> float:
        mesh = init_device_mesh("cpu", (2,))
        local = torch.ones(3)
        if rank == 1:
            local[1] = bad
        return float(exact_norm([DTensor.from_local(local, mesh, [Shard(0)]), torch.ones(2)]))

    assert all(math.isnan(norm) for norm in in_world(2, work))


def test_what_can_not_be_exact_is_named_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, reduction="exact") as run:
            model = run.parallelize(nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)))
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            run.track(model=model, optimizer=optimizer)
            data = run.data(samples())
            for step in run.steps(1):
                for x, y in step.micro_batches(data):
                    step.backward(model(x).sum(), count=len(y))
                step.update(optimizer)

    in_world(2, work)
    said = capfd.readouterr().err
    assert (
        said.count("reduction='exact': the running statistics of BatchNorm1d follow the micro-batches of rank 0") == 1
    )
    assert "reduction='exact': optimizer: fused optimizers round by where a tensor is cut" in said


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_optimizer_that_looks_at_whole_tensors_is_named_where_they_are_cut(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, reduction="exact", parallel=kind) as run:
            model = run.parallelize(nn.Linear(7, 4, bias=False))
            run.data(samples())
            run.track(model=model, a=torch.optim.Muon(model.parameters()), b=torch.optim.AdamW(model.parameters()))
            next(iter(run.steps(1)))

    in_world(2, work)
    said = [line for line in capfd.readouterr().err.splitlines() if "reduction='exact': " in line]
    assert ["reduction='exact': a: a Muon" in line for line in said] == [True] * (kind == "fsdp")


class Counting(nn.Module):
    """Scales by how often it was called: written to in place, and put anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.get_buffer("calls").add_(1)
            self.last = x.detach().mean()
        return x * self.get_buffer("calls") * self.get_buffer("fixed")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_buffers_that_forward_passes_change_are_named_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], parallel: str
) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, reduction="exact", parallel=parallel) as run:
            model = run.parallelize(nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), Counting(), nn.Linear(4, 5)))
            optimizer = torch.optim.AdamW(model.parameters())
            run.track(model=model, optimizer=optimizer)
            data = run.data(samples())
            for step in run.steps(2):
                for x, y in step.micro_batches(data):
                    step.backward(model(x).sum(), count=len(y))
                step.update(optimizer)

    in_world(2, work)
    said = [line for line in capfd.readouterr().err.splitlines() if "forward passes change" in line]
    assert len(said) == 1
    assert "reduction='exact': forward passes change 2.calls, 2.last by a rank's own micro-batches, and" in said[0]


def test_a_model_whose_buffers_stay_is_not_watched(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), Counting().eval())
    told: list[str] = []
    name_changed_buffers([model], told.append)
    with torch.no_grad():
        model(torch.zeros(3, 7))
    assert model._forward_hooks, "a pass without gradients tells nothing"
    model(torch.zeros(3, 7))
    assert (told, len(model._forward_hooks), len(model._forward_pre_hooks)) == ([], 0, 0)


def test_an_operator_without_a_deterministic_form_is_an_error_that_names_it(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, reduction="exact"):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    (error,) = errors(1, work)
    assert "put_ does not have a deterministic implementation" in str(error)


def test_a_block_that_is_used_twice_in_a_pass_changes_nothing(tmp_path: Path) -> None:
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in (*self.blocks, *self.blocks):
                x = layer(x)
            out: torch.Tensor = self.last(x)
            return out

    def work(rank: int, kind: str) -> str:
        return curve(tmp_path / kind, 2, Twice, blocks=(Block,), reduction="exact", **of(kind)).digest

    alone = in_world(1, partial(work, kind="none"))[0]
    assert {*in_world(3, partial(work, kind="ddp")), *in_world(3, partial(work, kind="fsdp"))} == {alone}


def test_sums_are_the_same_wherever_in_memory_an_element_lies(tmp_path: Path) -> None:
    """Three micro-batches and more on a rank: some are added up before DDP sends them off."""

    class Pictures(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Conv2d(7, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.turned = nn.Parameter(torch.randn(7, 4).t())
            self.holes = nn.Parameter(torch.randn(4, 14)[:, ::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = self.seen(x[:, :, None, None].expand(-1, -1, 2, 2)).mean((1, 2, 3))
            turned = (x @ self.turned.t()) * (x @ self.holes.t())
            out: torch.Tensor = super().forward(x + seen[:, None]) + turned.sum(1, keepdim=True)
            return out

    def work(rank: int, kind: str) -> str:
        return curve(tmp_path / f"{kind}{dist.get_world_size()}", 3, Pictures, reduction="exact", **of(kind)).digest

    alone = in_world(1, partial(work, kind="none"))[0]
    assert {*in_world(2, partial(work, kind="ddp")), *in_world(3, partial(work, kind="ddp"))} == {alone}


def test_the_loss_is_the_sum_in_the_order_of_the_list(tmp_path: Path) -> None:
    def work(rank: int) -> list[float]:
        return curve(tmp_path / str(dist.get_world_size()), 3, reduction="exact", global_batch=14).losses

    assert in_world(1, work)[0] == in_world(3, work)[0] == in_world(4, work)[3]


OPTIMIZERS: list[Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = [
    partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    partial(torch.optim.AdamW, lr=1e-3, foreach=False),
    partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.01),
    *(partial(kind, lr=1e-3) for kind in ELEMENTWISE),
]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.func.__name__)
def test_an_optimizer_rounds_an_element_the_same_wherever_its_tensor_is_cut(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
) -> None:
    """What exact sums under FSDP build upon: a shard's elements lie elsewhere in vectors of the processor."""
    dice = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        length = dice.randrange(1, 300)
        first = dice.randrange(length)
        end = dice.randrange(first + 1, length + 1)
        whole = torch.randn(length, generator=generator).requires_grad_()
        part = whole.detach()[first:end].clone().requires_grad_()
        optimizers = make([whole]), make([part])
        for _ in range(5):
            gradient = torch.randn(length, generator=generator) * 10 ** dice.uniform(-3, 3)
            whole.grad, part.grad = gradient, gradient[first:end].clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(whole[first:end], part)
