"""Faults of stock torch's checkpoints in what is saved, and in who plans it; dtrain has none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.checkpoint.plan import local_items
from dtrain.errors import SaveError
from tests.saving import Kept, Saver, commits, differences, restore, round_trip, save
from tests.stock import filled, still
from tests.world import alone, errors, in_world


def test_values_that_differ_between_ranks_are_lost_silently_in_stock_and_refused_by_dtrain(tmp_path: Path) -> None:
    def stock(rank: int) -> int:
        dcp.save({"sampler": {"position": 10 + rank}}, checkpoint_id=str(tmp_path / "stock"))
        found = {"sampler": {"position": -1}}
        dcp.load(found, checkpoint_id=str(tmp_path / "stock"))
        return found["sampler"]["position"]

    found = in_world(2, stock)
    still(len(set(found)) == 1, "of values with the same key one rank's is kept, and given to all")

    def dtrain(rank: int) -> None:
        torch.manual_seed(1)
        save(tmp_path / "run", 1, model=nn.Linear(2, 2), sampler=Kept({"position": 10 + rank}))

    for error in errors(2, dtrain):
        assert isinstance(error, SaveError)
        assert "sampler" in str(error)
        assert "differ between ranks" in str(error)
    assert commits(tmp_path / "run") == []


class Counting(torch.optim.AdamW):
    """Keeps the learning rate of every step."""

    def __init__(self, model: nn.Module) -> None:
        self.rates: list[float] = []
        super().__init__(model.parameters(), lr=0.1)

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_a_fresh_optimizer_is_stepped_by_stock_and_left_alone_by_dtrain(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    get_optimizer_state_dict(model, stepped := Counting(model))
    still(stepped.rates == [0.0], "get_state_dict steps an optimizer that has no state yet, with lr=0")
    still(len(stepped.state) == 2, "the step leaves state behind, which a run that was not saved doesn't have")

    def dtrain() -> tuple[list[float], int]:
        saved, restored = Counting(model), Counting(model)
        save(tmp_path, 1, model=model, optimizer=saved)
        assert restore(tmp_path, model=model, optimizer=restored) == 1
        return saved.rates + restored.rates, len(saved.state) + len(restored.state)

    assert alone(dtrain) == ([], 0)


def test_cached_plans_of_one_state_spoil_another_in_stock_and_dtrain_has_no_such_cache(tmp_path: Path) -> None:
    exact = torch.tensor([1.0 + 2.0**-40, 3.0], dtype=torch.float64)
    states: list[dict[str, Any]] = [{"model": {"w": torch.tensor([5.0, 6.0])}}, {"model.w": exact}]

    def stock(number: int) -> Any:
        folder = tmp_path / f"stock-{number}"
        dcp.save(states[number], checkpoint_id=str(folder), planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        dcp_to_torch_save(folder, tmp_path / "one.pt")
        return torch.load(tmp_path / "one.pt")

    spoiled = alone(lambda: [stock(0), stock(1)])[1]
    still(
        list(differences({"model": {"w": exact.float()}}, spoiled)) == [],
        "plans are cached on the class, and compared without types and structure: one state gets those of another",
    )

    found = alone(lambda: [round_trip(tmp_path / f"run-{number}", state) for number, state in enumerate(states)])
    assert list(differences(states, found)) == []


class Messages(TorchDispatchMode):
    """Keeps what this rank exchanges with the others through a process group, by the names of torch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class CountsBeforeWriting(dcp.FileSystemWriter):
    """Keeps which messages there were when the first byte is about to be written."""

    messages: Messages
    planning: list[str]

    def write_data(self, *args: Any) -> Any:
        self.planning = [*self.messages.names]
        return super().write_data(*args)


def state_of_all_kinds(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Whole tensors and DTensors, all of them full of ones; not every rank has a part of each."""
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, torch.Tensor] = {f"whole.{n}": torch.ones(n, 3) for n in (0, 1, 5, 40)} | {"one": torch.ones(())}
    whole = torch.ones(5, 3)
    for placement in (Shard(0), Shard(1), Replicate()):
        state[f"dtensor.{placement}"] = _distributed(whole, mesh, [placement])
    if world % 2 == 0:
        mesh = init_device_mesh("cpu", (2, world // 2))
        for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()], [Shard(0), Shard(1)]):
            state[f"dtensor.{placements}"] = _distributed(whole, mesh, placements)
    return state


def _distributed(whole: torch.Tensor, mesh: Any, placements: list[Any]) -> DTensor:
    part = whole
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = part.chunk(mesh.size(dimension), placement.dim)
            at = mesh.get_local_rank(dimension)
            part = parts[at] if at < len(parts) else part.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def test_stock_gathers_and_scatters_plans_and_dtrains_ranks_plan_without_a_word_and_miss_nothing(
    tmp_path: Path,
) -> None:
    def stock(rank: int) -> list[str]:
        writer = CountsBeforeWriting(tmp_path / "stock")
        writer.messages = Messages()
        with writer.messages:
            dcp.save({"a": filled(1.0)}, storage_writer=writer)
        return writer.planning

    for names in in_world(2, stock):
        still({"c10d.gather_.default", "c10d.scatter_.default"} <= set(names), "planning is a gather and a scatter")

    def whole_save(rank: int) -> list[str]:
        saver = Saver(tmp_path / "run", kept=Kept(filled(1.0)))
        messages = Messages()
        with messages:
            saver.save(1)
        return messages.names

    assert in_world(2, whole_save) == [[], []], "not only the planning, but all of a save"
    assert commits(tmp_path / "run") == [1]

    def dtrain(rank: int) -> tuple[list[str], dict[str, tuple[int, ...]], list[tuple[str, tuple[slice, ...]]]]:
        world = dist.get_world_size()
        state = state_of_all_kinds(rank, world)
        messages = Messages()
        with messages:
            items = local_items(state, rank, world)
        boxes = []
        for item in items:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            boxes.append((item.index.fqn, box))
        dist.barrier()  # the others may still be connecting, and would fail if this rank were gone
        return messages.names, {name: tuple(tensor.shape) for name, tensor in state.items()}, boxes

    for world in range(1, 8):
        ranks = in_world(world, dtrain)
        assert [messages for messages, _, _ in ranks] == [[]] * world
        written = {name: torch.zeros(shape) for name, shape in ranks[0][1].items()}
        for _, _, boxes in ranks:
            for name, box in boxes:
                written[name][box] += 1
        assert {name: times.eq(1).all().item() for name, times in written.items()} == dict.fromkeys(written, True)
        assert {name for _, _, boxes in ranks for name, _ in boxes} == set(written), "also what holds no element"
