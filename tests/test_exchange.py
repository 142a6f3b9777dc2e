"""The numbers that ride with the gradients arrive, whatever the gradients are like."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dtrain.training.ddp import Replicated
from dtrain.training.exchange import Exchange, Totals
from tests.world import in_world, outcomes


def model(*, dtype: torch.dtype = torch.float32, layers: int = 3) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for _ in range(layers)))


def gradients_of(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def total_of(world: int, counts: list[int]) -> Totals:
    """What each rank sends below, added up."""
    ranks = range(world)
    loss = sum(1.5 * rank + 1e-3 for rank in ranks)
    orders = tuple(2**24 - 1 - rank for rank in ranks)
    return Totals(sum(counts[rank] for rank in ranks), loss, world > 1, False, 2, (), orders)


def send(exchange: Exchange, rank: int, counts: list[int]) -> None:
    action, order = 0 if rank else 2, 2**24 - 1 - rank
    exchange.send(counts[rank], 1.5 * rank + 1e-3, stop=rank == 1, end=False, action=action, order=order)


def assert_equal(found: Totals, expected: Totals) -> None:
    assert (found.count, found.stop, found.action) == (expected.count, expected.stop, expected.action)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.orders == expected.orders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_counts_arrive_exactly_and_gradients_are_sums(world: int, dtype: torch.dtype) -> None:
    counts = [0, 2**37 + 1023, 5 * 1024 + 1]

    def work(rank: int) -> tuple[Totals, list[torch.Tensor], list[torch.Tensor]]:
        exchange = Exchange()
        net = Replicated(model(dtype=dtype), exchange, exact=False).module
        alone = model(dtype=dtype)
        x = torch.full((4, 8), 1.0 + rank, dtype=dtype)
        for each in (net, alone):
            if each is net:
                send(exchange, rank, counts)
            each(x).sum().backward()
        exchange.depart()
        return exchange.totals(), gradients_of(net), gradients_of(alone)

    results = in_world(world, work)
    for totals, gradients, _ in results:
        assert_equal(totals, total_of(world, counts))
        for index, gradient in enumerate(gradients):
            expected = torch.stack([alone[index].double() for _, _, alone in results]).sum(0)
            torch.testing.assert_close(
                gradient.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0.1
            )


def test_they_ride_with_one_of_several_models_or_alone_when_none_is_used() -> None:
    counts = [3, 4]

    def work(rank: int) -> list[Totals]:
        exchange = Exchange()
        first, second = (Replicated(model(), exchange, exact=False).module for _ in range(2))
        own = model()
        x = torch.full((4, 8), 1.0 + rank)
        found = []
        for used in ((first, second), (second,), (own,)):
            send(exchange, rank, counts)
            torch.stack([each(x).sum() for each in used]).sum().backward()
            exchange.depart()
            found.append(exchange.totals())
        return found

    for found in in_world(2, work):
        for totals in found:
            assert_equal(totals, total_of(2, counts))


def test_a_rank_whose_peer_died_in_the_sum_does_not_go_on_alone() -> None:
    def work(rank: int) -> str:
        exchange = Exchange()
        net = Replicated(model(), exchange, exact=False).module
        exchange.send(1, 1.0, stop=False, end=False, action=0)
        net(torch.ones(2, 8)).sum().backward()
        exchange.depart()
        assert exchange.totals().count == 2
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange.send(1, 1.0, stop=False, end=False, action=0)
        with pytest.raises(RuntimeError) as found:
            net(torch.ones(2, 8)).sum().backward()
        return str(found.value)

    survivor, dead = outcomes(2, work)
    assert "gloo" in survivor
    assert dead == "ended with -9"


def test_a_step_that_begins_a_second_time_has_marks_of_its_own() -> None:
    exchange = Exchange()
    exchange.looks = True
    found = []
    for _ in range(2):
        exchange.begin(3)
        exchange.look(torch.arange(5.0))
        exchange.look(torch.arange(7.0))
        found.append(exchange.marks())
    assert found[0] == found[1]
