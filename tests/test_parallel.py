"""Whatever a model is spread by, and however many ranks there are, it learns the same."""

from __future__ import annotations

import copy
import shutil
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dtrain.errors import UsageError
from dtrain.training.prepare import blocks_of
from tests.layers import SAMPLES, Block, Curve, Net, curve, samples
from tests.training import opened
from tests.world import in_world

STEPS = 20
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 3e-2)}
"""Of losses and of the norms of gradients, relative: some hundred roundings of the type."""


def options_of(kind: str, **options: Any) -> dict[str, Any]:
    return {"parallel": kind, "shard_size": 2} | options if kind == "hsdp" else {"parallel": kind} | options


@cache
def alone(precision: str, micro_batches: int) -> Curve:
    """The curve of one process."""
    return in_world(1, lambda rank: in_new_folder(parallel="none", precision=precision, micro_batches=micro_batches))[0]


def in_new_folder(micro_batches: int, **options: Any) -> Curve:
    with TemporaryDirectory() as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared)
        found = curve(Path(shared[0]), STEPS, global_batch=2 * micro_batches, micro_batch=2, **options)
        dist.barrier()
        return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_layout_precision_and_accumulation_has_the_curve_of_one_process(ranks: int) -> None:
    kinds = ("none", "ddp", "fsdp", "hsdp") if ranks == 1 else ("ddp", "fsdp", "hsdp")
    grid = list(product(kinds, ("fp32", "bf16"), (1, 4), ("none", "full")))

    def work(rank: int) -> list[Curve]:
        return [
            in_new_folder(
                ranks * accumulated, **options_of(kind, precision=precision, activation_checkpointing=recomputed)
            )
            for kind, precision, accumulated, recomputed in grid
        ]

    for place, found in zip(grid, in_world(ranks, work, timeout_s=250)[0], strict=True):
        _, precision, accumulated, _ = place
        expected = alone(precision, ranks * accumulated)
        losses, norms = TOLERANCE[precision]
        assert found.losses == pytest.approx(expected.losses, rel=losses), place
        assert found.norms == pytest.approx(expected.norms, rel=norms), place
        assert found.keys == expected.keys, "the names are those of the bare model"
        assert found.losses[-1] < 0.95 * found.losses[0]


LAYOUTS = [("none", 1), ("ddp", 2), ("fsdp", 3), ("hsdp", 4)]


def test_a_checkpoint_of_any_layout_is_continued_in_any_other_with_the_same_bits(tmp_path: Path) -> None:
    """Sums are exact here, so that there is one right result, to the last bit."""

    def continued(root: Path, steps: int, kind: str, ranks: int) -> Curve:
        options = options_of(kind, reduction="exact")
        return in_world(ranks, lambda rank: curve(root, steps, **options))[0]

    right = continued(tmp_path / "right", 5, "none", 1)
    for kind, ranks in LAYOUTS:
        assert continued(tmp_path / kind, 2, kind, ranks).losses == right.losses[:2]
    for (before, _), (after, ranks) in product(LAYOUTS, LAYOUTS):
        folder = tmp_path / f"{before}-{after}"
        shutil.copytree(tmp_path / before, folder)
        found = continued(folder, 5, after, ranks)
        assert (found.losses, found.digest) == (right.losses[2:], right.digest), f"{before}, then {after}"
    for ranks in (2, 4):  # the same layout on other numbers of ranks
        folder = tmp_path / f"fsdp-{ranks}"
        shutil.copytree(tmp_path / "fsdp", folder)
        assert continued(folder, 5, "fsdp", ranks).digest == right.digest


def test_a_rank_with_fewer_micro_batches_makes_a_pass_that_the_loop_does_not_see(tmp_path: Path) -> None:
    """Five micro-batches on three ranks: 1, 2, 2."""

    forwards = 0

    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
            self.replaced: torch.Tensor
            self.register_buffer("replaced", torch.zeros(()))
            self.normed = nn.BatchNorm1d(7, momentum=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            self.get_buffer("passes").add_(1)
            self.replaced = self.replaced + 1
            return super().forward(self.normed(x))

    def work(rank: int) -> tuple[int, int, int, float]:
        seen = 0
        with opened(tmp_path, parallel="fsdp", global_batch=10, micro_batch=2) as run:
            model = run.parallelize(Counting())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                means = []
                for x, y in step.micro_batches(data):
                    noise = torch.rand(())
                    means.append(x.mean(0))
                    step.backward(nn.functional.cross_entropy(model(x), y, reduction="sum"), count=len(y))
                    after = torch.rand(())
                    seen += len(y)
                passes = int(model.get_buffer("passes"))
                assert int(model.get_buffer("replaced")) == passes
                running: Any = model.get_submodule("normed").running_mean
                assert torch.allclose(running, torch.stack(means).mean(0)), "which BatchNorm writes past versions"
                step.update(optimizer)
            return seen, forwards, passes, float(noise + after)

    found = in_world(3, work)
    assert [seen for seen, *_ in found] == [2, 4, 4], "samples that the loop was given"
    assert [forwards for _, forwards, *_ in found] == [2, 2, 2], "passes of the model"
    assert [passes for *_, passes, _ in found] == [1, 2, 2], "a buffer doesn't remember the spare one"


def test_a_model_on_the_meta_device_gets_the_same_values_in_every_layout(tmp_path: Path) -> None:
    def made() -> nn.Module:
        with torch.device("meta"):
            return Net()

    def work(rank: int, kind: str) -> Curve:
        return curve(tmp_path / kind, 2, made, **options_of(kind, reduction="exact"))

    found = [in_world(ranks, partial(work, kind=kind))[0] for kind, ranks in LAYOUTS]
    assert {curve.digest for curve in found} == {found[0].digest}
    assert found[0].losses[0] == pytest.approx(1.6, abs=0.3), "that of a model that knows nothing: log 5"


def test_a_shared_parameter_on_the_meta_device_stays_shared(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.out.weight = self.into.weight

    def work(rank: int) -> bool:
        with torch.device("meta"):
            tied = Tied()
        with opened(tmp_path) as run:
            run.parallelize(tied)
        return tied.into.weight is tied.out.weight and not tied.into.weight.is_meta

    assert in_world(1, work) == [True]


def test_tensor_parallelism_is_brought_along_by_a_function(tmp_path: Path) -> None:
    """Two ranks compute each micro-batch together, under FSDP over two such pairs."""

    def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        plan = {"wide": ColwiseParallel(), "narrow": RowwiseParallel()}
        for block in model.get_submodule("blocks").children():
            parallelize_module(block, mesh, plan)
        return model

    class Even(Block):
        def __init__(self) -> None:
            super().__init__(12)
            self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    class EvenNet(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 12), nn.Linear(12, 5)
            self.blocks = nn.ModuleList(Even() for _ in range(2))

    def trained(root: Path, ranks: int, reduction: str) -> Curve:
        def work(rank: int) -> Curve:
            parallel: dict[str, Any] = {"parallel": "fsdp", "tensor_parallel": 2} if ranks > 1 else {}
            with opened(root, global_batch=12, micro_batch=2, reduction=reduction, **parallel) as run:
                with torch.device("meta" if reduction == "exact" else "cpu"):
                    bare = EvenNet()
                model = run.parallelize(bare, tensor_parallel=split if ranks > 1 else None)
                assert run._parallel.shares() == ([6] if ranks == 1 else [3, 3, 3, 3])
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                data = run.data(samples())
                run.track(model=model, optimizer=optimizer)
                losses, norms = [], []
                for step in run.steps(6):
                    for x, y in step.micro_batches(data):
                        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
                        step.backward(loss, count=len(y))
                    step.update(optimizer, clip=0.5)
                    losses.append(step.loss)
                    norms.append(step.gradient_norm)
                return Curve(losses, norms, list(model.state_dict()), "")

        return in_world(ranks, work)[0]

    for reduction in ("fast", "exact"):
        one, four = (trained(tmp_path / f"{reduction}{ranks}", ranks, reduction) for ranks in (1, 4))
        assert four.losses == pytest.approx(one.losses, rel=1e-5)
        assert four.norms == pytest.approx(one.norms, rel=1e-4)
        assert four.keys == one.keys


def test_the_repeated_module_is_found() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(Inner() for _ in range(2))
            self.right = nn.Sequential(Inner(), nn.ReLU(), Inner())
            self.head = nn.Linear(4, 4)

    assert list(blocks_of(Towers(), None)) == ["left.0", "left.1", "right.0", "right.2"]
    assert list(blocks_of(Net(3), None)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(blocks_of(Net(3), (nn.Linear,)))[:2] == ["first", "blocks.0.wide"]
    assert blocks_of(nn.Linear(3, 3), None) == {}
    with pytest.raises(UsageError, match=r"parallelize\(blocks=\(Conv2d\)\): a Net has no module of these classes"):
        blocks_of(Net(), (nn.Conv2d,))


@pytest.mark.parametrize("how", ["selective", 2])
def test_recomputing_changes_no_bit_and_a_copy_has_its_own_parameters(tmp_path: Path, how: str | int) -> None:
    def work(rank: int) -> bool:
        kept = curve(tmp_path / "kept", 3)
        with opened(tmp_path / "copied", activation_checkpointing=how) as run:
            model = run.parallelize(Net())
            assert len({type(block) for block in model.blocks}) == (2 if how == 2 else 1)  # type: ignore[union-attr]
            twin = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert not twin(torch.ones(2, 7)).any()
            assert model(torch.ones(2, 7)).any()
        return curve(tmp_path / "recomputed", 3, activation_checkpointing=how).digest == kept.digest

    assert in_world(1, work) == [True]


def test_the_samples_are_those_of_one_process_under_fsdp(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[int]]:
        found = []
        with opened(tmp_path, parallel="fsdp", global_batch=14, micro_batch=2) as run:
            model = run.parallelize(Net())
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            data = run.data(torch.utils.data.TensorDataset(samples().tensors[0], torch.arange(SAMPLES)))
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(8):
                mine: list[int] = []
                for x, ids in step.micro_batches(data):
                    mine += ids.tolist()
                    step.backward(model(x).sum(), count=len(x))
                step.update(optimizer)
                found.append(mine)
        return found

    ranks = in_world(3, work)
    used = [sample for step in range(8) for rank in ranks for sample in rank[step]]
    assert sorted(used[:SAMPLES]) == list(range(SAMPLES)), "each once in the first epoch"


def test_an_optimizer_that_takes_part_in_every_second_step_sees_that_step_alone(tmp_path: Path) -> None:
    def work(rank: int, kind: str) -> list[torch.Tensor]:
        with opened(tmp_path / f"{kind}{dist.get_world_size()}", parallel=kind, reduction="exact") as run:
            nets = [run.parallelize(nn.Linear(7, 1)) for _ in range(2)]
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
            data = run.data(samples())
            run.track(first=nets[0], second=nets[1], one=optimizers[0], other=optimizers[1])
            for step in run.steps(4):
                for x, _ in step.micro_batches(data):
                    step.backward((nets[0](x) + nets[1](x)).square().sum(), count=len(x))
                step.update(optimizers[0])
                if step.number % 2 == 0:
                    step.update(optimizers[1])
            return [parameter.detach().clone() for net in nets for parameter in net.parameters()]

    alone = in_world(1, partial(work, kind="none"))[0]
    for ranks in (2, 3):
        for found in in_world(ranks, partial(work, kind="ddp")):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
