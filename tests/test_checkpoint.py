"""What is saved comes back with the same bits: models, optimizers, schedulers and whatever else is tracked."""

from __future__ import annotations

import copy
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dtrain.checkpoint.channel import Remote
from dtrain.checkpoint.slots import Slots
from dtrain.checkpoint.state import State
from dtrain.errors import StateError, UsageError
from tests.saving import Kept, Saver, bits, differences, restore, save
from tests.world import alone, errors, in_world


class Tied(nn.Module):
    """Everything that a module can hold: tied weights, buffers, several types, views, nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.small = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.picture = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.randn(0, 3))
        self.view = nn.Parameter(torch.randn(6, 4).t()[1:3])
        self.register_buffer("counts", torch.randint(100, (3,)))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("passing", torch.randn(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embedding(ids))
        picture = self.picture(hidden[:2, :2].reshape(1, 2, 1, 2).repeat(1, 1, 3, 3))
        out = self.head(hidden).sum() * self.scale + self.view.sum() * picture.mean()
        total: torch.Tensor = out + self.small(hidden.bfloat16()).float().pow(2).sum()
        return total


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9, centered=True),
    "lr in a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "named": lambda m: torch.optim.AdamW(m.named_parameters()),
    "groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p.dim() <= 1], "lr": 0.5, "betas": (0.5, 0.6)},
        ]
    ),
}


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = make(model)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(7)).backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_and_its_optimizer_come_back_bit_for_bit_and_go_on_alike(tmp_path: Path, kind: str, ranks: int) -> None:
    def work(rank: int) -> list[str]:
        model, optimizer = trained(OPTIMIZERS[kind], seed=1)
        save(tmp_path, 3, model=model, optimizer=optimizer)
        other, its = trained(OPTIMIZERS[kind], seed=2)
        assert bits(other.scale) != bits(model.scale)
        assert restore(tmp_path, model=other, optimizer=its) == 3
        found = list(differences(everything(model, optimizer), everything(other, its)))
        assert other.head.weight is other.embedding.weight
        step(model, optimizer)
        step(other, its)
        return found + list(differences(everything(model, optimizer), everything(other, its)))

    assert in_world(ranks, work) == [[]] * ranks


def test_a_fresh_optimizer_takes_up_what_was_saved_and_an_unused_one_stays_unused(tmp_path: Path) -> None:
    def work() -> list[str]:
        model, optimizer = trained(OPTIMIZERS["AdamW"], seed=1)
        save(tmp_path / "used", model=model, optimizer=optimizer)
        other = Tied()
        fresh = torch.optim.AdamW(other.parameters(), lr=9.0, amsgrad=True)
        save(tmp_path / "unused", model=other, optimizer=fresh)
        restore(tmp_path / "used", model=other, optimizer=fresh)
        found = list(differences(everything(model, optimizer), everything(other, fresh)))
        restore(tmp_path / "unused", model=model, optimizer=optimizer)
        assert (optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]) == ({}, 9.0)
        return found

    assert alone(work) == []


def test_state_of_another_type_than_its_parameter_keeps_its_type(tmp_path: Path) -> None:
    def work() -> list[str]:
        model = nn.Linear(3, 2, dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.weight] = {"master": torch.randn(2, 3), "seen": torch.tensor([5, 6])}
        save(tmp_path, model=model, optimizer=optimizer)
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.state.clear()
        restore(tmp_path, model=model, optimizer=optimizer)
        return list(differences(before, optimizer.state_dict()))

    assert alone(work) == []


def test_state_in_lists_and_dicts_keeps_its_type_as_well(tmp_path: Path) -> None:
    """As Shampoo and SOAP keep it."""

    def work() -> list[str]:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stats = [torch.randn(3, dtype=torch.float64), {"seen": torch.tensor([1 << 40])}, torch.randn(2), 7]
        optimizer.state[model.weight] = {"stats": stats, "both": (torch.tensor(3), None), "basis": "eigen"}
        save(tmp_path, model=model, optimizer=optimizer)
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.state.clear()
        restore(tmp_path, model=model, optimizer=optimizer)
        return list(differences(before, optimizer.state_dict()))

    assert alone(work) == []


def test_two_models_and_an_optimizer_over_both_come_back(tmp_path: Path) -> None:
    def work() -> list[str]:
        def make(seed: int) -> dict[str, Any]:
            torch.manual_seed(seed)
            objects: dict[str, Any] = {"actor": nn.Linear(3, 3), "critic": nn.Linear(3, 1)}
            both = [*objects["critic"].parameters(), *objects["actor"].parameters()]
            objects["optimizer"] = torch.optim.Adam(both)
            objects["critic"](objects["actor"](torch.randn(4, 3))).sum().backward()
            objects["optimizer"].step()
            return objects

        one, other = make(1), make(2)
        save(tmp_path, **one)
        restore(tmp_path, **other)
        return [d for name in one for d in differences(dict(one[name].state_dict()), dict(other[name].state_dict()))]

    assert alone(work) == []


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=20),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 20)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_scheduler_goes_on_where_it_was(tmp_path: Path, kind: str, steps: int) -> None:
    def make() -> dict[str, Any]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[kind](optimizer)}

    def go(objects: dict[str, Any], count: int) -> list[float]:
        rates = []
        for _ in range(count):
            objects["optimizer"].step()
            objects["scheduler"].step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            rates.append(objects["optimizer"].param_groups[0]["lr"])
        return rates

    def work() -> tuple[list[float], list[float]]:
        one, other = make(), make()
        go(one, steps)  # without any, ReduceLROnPlateau's best is still infinite
        save(tmp_path, **one)
        restore(tmp_path, **other)
        assert list(differences(one["scheduler"].state_dict(), other["scheduler"].state_dict())) == []
        return go(one, 6), go(other, 6)

    rates, again = alone(work)
    assert rates == again
    assert len(set(rates)) > 1


def test_a_scaler_and_a_generator_come_back(tmp_path: Path) -> None:
    def work() -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))  # the scale is made at its first use
        scaler.update(new_scale=4096.0)
        generator = torch.Generator().manual_seed(5)
        torch.rand(3, generator=generator)
        save(tmp_path, scaler=scaler, generator=generator)
        expected = torch.rand(5, generator=generator)
        other, its = torch.amp.GradScaler("cpu"), torch.Generator()
        restore(tmp_path, scaler=other, generator=its)
        assert other.state_dict() == scaler.state_dict()
        assert other.get_scale() == 4096.0
        assert bits(torch.rand(5, generator=its)) == bits(expected)

    alone(work)


@pytest.mark.parametrize("pair", [(1, 2), (2, 1), (3, 2)])
def test_a_checkpoint_is_read_by_another_number_of_ranks(tmp_path: Path, pair: tuple[int, int]) -> None:
    def write(rank: int) -> None:
        model, optimizer = trained(OPTIMIZERS["AdamW"], seed=1)
        save(tmp_path, 3, model=model, optimizer=optimizer)

    def read(rank: int) -> list[str]:
        model, optimizer = trained(OPTIMIZERS["AdamW"], seed=2 + rank)
        restore(tmp_path, model=model, optimizer=optimizer)
        return list(differences(everything(*trained(OPTIMIZERS["AdamW"], seed=1)), everything(model, optimizer)))

    in_world(pair[0], write)
    assert in_world(pair[1], read) == [[]] * pair[1]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)),
            ["model.0.weight: saved with shape (4, 3), now (5, 3)"],
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4)), ["model.1.weight: in the checkpoint only"]),
        (lambda: nn.Sequential(*map(nn.Linear, (3, 4, 1), (4, 1, 1))), ["model.2.bias: not in the checkpoint"]),
        (
            lambda: nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 1)),
            ["model.0.bias: saved as float32, now float64", "model.0.weight: saved as float32, now float64"],
        ),
    ],
)
def test_another_model_is_refused_by_name_and_the_checkpoint_stays_good(
    tmp_path: Path, change: Callable[[], nn.Module], lines: list[str]
) -> None:
    def work(rank: int) -> object:
        save(tmp_path, 8, model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
        return restore(tmp_path, model=change())

    for error in errors(2, work):
        assert isinstance(error, StateError)
        assert str(error).startswith("what is tracked is not what was saved at step 8:\n")
        assert not [line for line in lines if line not in str(error)], error
    assert alone(lambda: restore(tmp_path, model=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"best": Kept({})}, "best: tracked now, but not in the checkpoint"),
        (lambda m: {"optimizer": None}, "optimizer: in the checkpoint, but not tracked now"),
        (lambda m: {"optimizer": torch.optim.SGD(m.parameters())}, "optimizer: saved by another kind of optimizer"),
        (lambda m: {"optimizer": torch.optim.AdamW([m.weight])}, "optimizer: bias left group 0"),
        (
            lambda m: {"optimizer": torch.optim.AdamW([{"params": m.weight}, {"params": m.bias}])},
            "optimizer: saved with 1 parameter groups, now 2",
        ),
        (lambda m: {"kept": torch.optim.AdamW(m.parameters())}, "kept: an optimizer now, but something else was saved"),
    ],
)
def test_other_objects_than_the_saved_ones_are_refused(
    tmp_path: Path, change: Callable[[nn.Linear], dict[str, Any]], message: str
) -> None:
    def work(rank: int) -> object:
        model = nn.Linear(2, 1)
        objects: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "kept": Kept({})}
        save(tmp_path, **objects)
        return restore(tmp_path, **{k: v for k, v in (objects | change(model)).items() if v is not None})

    (error,) = errors(1, work)
    assert isinstance(error, StateError)
    assert message in str(error)


@pytest.mark.parametrize("name", ["model.average", "$model"])
def test_a_name_that_could_not_be_told_from_a_part_of_another_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"track.{re.escape(repr(name))}.: a name has no dots, and no dollar"):
        State().track({name: nn.Linear(1, 1)})


class Counting(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"calls": 7}


def test_an_optimizer_that_keeps_more_than_its_parameters_states_is_named() -> None:
    model = nn.Linear(1, 1)
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.state["count"] = 3  # type: ignore[index]
    state = State()
    state.track({"model": model, "sgd": optimizer})
    with pytest.raises(StateError, match="sgd: a Counting keeps 'calls', 'count' beside the states of its parameters"):
        state.tree({})


def test_metrics_that_are_too_many_for_a_message_are_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    slots = Slots()
    saver = Remote(ours, slots.board, 0)
    with ours, theirs, pytest.raises(UsageError, match="save: 9000 metrics take"):
        saver.begin(slots.snapshot(0), {f"a/metric/{number}": 1.0 for number in range(9000)})
    assert not saver.busy


def test_a_parameter_of_no_tracked_module_is_refused_by_shape_and_group(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model, other = nn.Linear(2, 1), nn.Linear(5, 6)
        both = [{"params": model.parameters()}, {"params": other.parameters()}]
        Saver(tmp_path, model=model, optimizer=torch.optim.SGD(both)).save(1)

    (error,) = errors(1, work)
    assert str(error).startswith("optimizer: a parameter of shape (6, 5) in group 1 belongs to no tracked module")
