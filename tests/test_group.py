"""A group of supervisors in a real store: nobody begins before all are there, and who falls silent is missed."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from dtrain.elastic.generation import Group, Outcome
from dtrain.elastic.page import Page
from dtrain.elastic.placement import Placement


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    yield "127.0.0.1", port
    del store


def formed(address: tuple[str, int], late_s: float, nodes: int = 3) -> tuple[list[Group], list[float]]:
    """A group of one rank a node, of which the last is late, and when each had formed it."""
    groups: dict[int, Group] = {}
    times: dict[int, float] = {}

    def form(rank: int) -> None:
        time.sleep(late_s if rank == nodes - 1 else 0)
        groups[rank] = Group(Placement(rank, nodes, store=address, job="job", node=rank, nodes=nodes), 30)
        times[rank] = time.monotonic()

    threads = [threading.Thread(target=form, args=(rank,)) for rank in range(nodes)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [groups[rank] for rank in range(nodes)], [times[rank] - begun for rank in range(nodes)]


def test_nobody_begins_before_all_are_there(address: tuple[str, int]) -> None:
    _, times = formed(address, 2.0)
    assert min(times) > 1.9


def test_a_node_that_falls_silent_ends_the_generation_that_is_under_way(address: tuple[str, int]) -> None:
    groups, _ = formed(address, 0)
    pages = [Page.shared() for _ in groups]
    for page in pages:
        page.begin(4, 0)
    for group, page in zip(groups[:2], pages, strict=False):  # the third has no heart
        threading.Thread(target=group.beat, args=(page,), daemon=True).start()
    begun = time.monotonic()
    assert groups[0].watch(4) == 0
    assert 2.5 < time.monotonic() - begun < 10
    assert groups[0].outcome(4) == Outcome(kind="lost", cause="node 2 of 3 has not been heard of for 3 s", node=2)


def test_the_word_of_an_end_is_for_the_restart_that_follows_and_no_later_one(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,), _ = formed(address, 0, nodes=1)
    restarted = Placement(store=address, job="job", restarts=1)
    end = Outcome(kind="stopped", rank=0, cause="planted", skipped=(3,))
    group.remember_end("run", end)
    assert Group.ended_before(restarted, "run") == end
    assert Group.ended_before(restarted, "another run") is None
    first = Placement(store=address, job="job")
    assert Group.ended_before(first, "run") == end, "a spare, whose agent was there before the end"
    agent = subprocess.Popen(["sleep", "60"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", lambda: agent.pid)
        time.sleep(0.1)
        group.remember_end("run", end)
        assert Group.ended_before(first, "run") == end
        agent.kill()
        agent.wait()
        time.sleep(0.1)
        agent = subprocess.Popen(["sleep", "60"])
        assert Group.ended_before(first, "run") is None, "a start after the end"
    agent.kill()
    agent.wait()
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 100)
        assert Group.ended_before(restarted, "run") is None
    group.forget_end("run")
    assert Group.ended_before(restarted, "run") is None, "the next start of the same job has formed"


def test_failures_are_counted_for_an_hour_and_up_to_the_end_of_the_run(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,), _ = formed(address, 0, nodes=1)
    for _ in range(3):
        group.remember_failure("run")
    assert len(group.failures("run")) == 3
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert group.failures("run") == []
    group.remember_failure("run")
    group.forget_failures("run")
    assert group.failures("run") == []
