"""What one layout has saved, any other loads with the same bits: plain, DDP, FSDP2 and HSDP on one to four ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from dtrain.checkpoint import load
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.reader import load_shared, load_tensors
from dtrain.errors import Damaged
from dtrain.storage.local import LocalStorage
from tests.saving import bits
from tests.steps_of_a_run import flip
from tests.world import in_world
from tests.written import held, in_blocks_of, manifest_of, whole, write, write_tree

Objects = dict[str, Any]


class Net(nn.Module):
    """Sizes that no number of ranks divides; one of them leaves the last of three or four ranks without a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 2, dtype=torch.float32)
        self.scale = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.norm(self.first(x))) * self.scale
        return out


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.get_submodule("first"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    return model


LAYOUTS: list[tuple[Callable[[nn.Module], nn.Module], int]] = [(plain, 1), (ddp, 2), (fsdp2, 2), (fsdp2, 3), (hsdp, 4)]


def made(layout: Callable[[nn.Module], nn.Module], seed: int, steps: int) -> Objects:
    """The same state on any layout: the gradients don't depend on how the ranks are laid out."""
    torch.manual_seed(seed)
    model = layout(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * (number + step + seed))
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def contents(objects: Objects) -> dict[str, bytes]:
    """The bits of all tensors, gathered. All ranks must reach it."""
    model = objects["model"].module if isinstance(objects["model"], DistributedDataParallel) else objects["model"]
    found = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in objects["optimizer"].state[parameter].items():
            found[f"{name}.{key}"] = whole(value)
    return found


def save(root: Path, layout: Callable[[nn.Module], nn.Module], rank: int) -> dict[str, bytes]:
    objects = made(layout, seed=1, steps=2)
    write(root, 1, **objects)
    return contents(objects)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """A run folder that each layout has saved, with what it held."""
    found = {}
    for layout, ranks in LAYOUTS:
        name = f"{layout.__name__} {ranks}"
        root = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = root, in_world(ranks, partial(save, root, layout))[0]
    return found


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_layout_loads_what_any_other_has_saved_with_the_same_bits(
    saved: dict[str, tuple[Path, dict[str, bytes]]], layout: Callable[[nn.Module], nn.Module], ranks: int
) -> None:
    def work(rank: int) -> list[str]:
        wrong = []
        objects = made(layout, seed=2, steps=1)
        before = contents(objects)
        for name, (root, expected) in saved.items():
            assert not [key for key in expected if key.endswith("weight") and before[key] == expected[key]]
            load(root, objects)
            found = contents(objects)
            wrong += [f"{name}: {key}" for key in expected if found.get(key) != expected[key]]
            before = contents(redo(objects))
        return wrong

    def redo(objects: Objects) -> Objects:
        with torch.no_grad():
            for tensor in objects["model"].state_dict().values():
                tensor.zero_()
            for state in objects["optimizer"].state.values():
                for tensor in state.values():
                    tensor.zero_()
        return objects

    assert in_world(ranks, work) == [[]] * ranks


SHARDS: list[list[Placement]] = [[Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]]
SHAPES = [(3, 5, 4), (1, 7, 2), (64, 3, 33), (2, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex128], ids=str)
def test_tensors_sharded_on_any_dimension_load_into_any_other_with_the_same_bits(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Blocks of 64 bytes, so that they cut these tensors as real ones cut large ones."""

    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (3,))

        def tensor(shape: tuple[int, ...], placements: list[Placement], fill: bool) -> DTensor:
            full = torch.arange(torch.Size(shape).numel()).reshape(shape) % 251 % (2 if dtype == torch.bool else 999)
            local = full.to(dtype) if fill else torch.zeros(shape, dtype=dtype)
            for placement in placements:
                if isinstance(placement, Shard):
                    parts = local.chunk(3, placement.dim)
                    local = parts[rank] if rank < len(parts) else local.narrow(placement.dim, 0, 0)
            stride = full.stride()
            made: DTensor = DTensor.from_local(
                local.clone(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
            return made

        wrong = []
        states = {
            str(placements): {f"t{number}": tensor(shape, placements, fill=True) for number, shape in enumerate(SHAPES)}
            for placements in SHARDS
        }
        folder = write_tree(tmp_path, states)
        manifest = in_blocks_of(64, folder)
        storage = LocalStorage(str(folder))
        for placements, number in product(SHARDS, range(len(SHAPES))):
            for source in states:
                target = tensor(SHAPES[number], placements, fill=False)
                load_tensors(storage, ".", manifest, {f"{source}.t{number}": target})
                expected = tensor(SHAPES[number], placements, fill=True)
                if bits(local_part(target)) != bits(local_part(expected)):
                    wrong.append(f"{source} into {placements} of {SHAPES[number]}")
        return wrong

    assert in_world(3, work) == [[]] * 3


def test_half_of_the_state_on_each_of_two_ranks_reads_half_of_the_bytes(tmp_path: Path) -> None:
    def model(rank: int) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(256, 2048, bias=False) for _ in range(6)))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model

    def work(rank: int) -> tuple[int, int]:
        objects = {"model": model(rank)}
        for parameter in objects["model"].parameters():
            nn.init.zeros_(parameter)
        mine = sum(held(parameter) for parameter in objects["model"].parameters())
        return load(tmp_path, objects).bytes_read, mine

    folder = in_world(2, lambda rank: write(tmp_path, model=model(rank)))[0]
    files = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    for read, mine in in_world(2, work):
        assert mine == 6 * 256 * 2048 * 4 // 2
        assert mine <= read <= files // 2, "the frames, and no byte more than its own file has"
    for read, mine in in_world(1, work):
        assert (mine, mine <= read <= files) == (6 * 256 * 2048 * 4, True)


def test_what_all_ranks_hold_is_read_by_one_of_them_and_sent_to_the_others(tmp_path: Path) -> None:
    """With gloo, which shows that it is right; it pays with NCCL."""

    def state(fill: float) -> dict[str, torch.Tensor]:
        mesh = init_device_mesh("cpu", (3,))
        local = torch.full((2, 5), fill * (1 + dist.get_rank()))
        whole = {f"t{number}": torch.full((number, 100), fill * number) for number in range(20)}
        return whole | {"sharded": DTensor.from_local(local, mesh, [Shard(0)])}

    def work(rank: int) -> tuple[int, int]:
        folder = write_tree(tmp_path, state(1.0))
        found = state(0.0)
        read = load_shared(LocalStorage(str(folder)), ".", manifest_of(folder), found)
        for name, tensor in state(1.0).items():
            assert bits(local_part(found[name])) == bits(local_part(tensor)), name
        dist.barrier()
        chunk = manifest_of(folder).tensors["t19"].chunks[0]
        if rank == 2:
            flip(folder / chunk.file, chunk.offset + chunk.payload)
        dist.barrier()
        with pytest.raises(Damaged, match=r"rank \d: .*\(t19\)"):
            load_shared(LocalStorage(str(folder)), ".", manifest_of(folder), found)
        return read, sum(path.stat().st_size for path in folder.glob("*.distcp"))

    ranks = in_world(3, work)
    assert sum(read for read, _ in ranks) <= ranks[0][1], "nothing is read twice"
    assert max(read for read, _ in ranks) < ranks[0][1] * 0.45
