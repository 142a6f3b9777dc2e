"""What a group of supervisors asks of the store: forming, being idle, and learning of a failure.

The supervisors are simulated by threads, each with the connections that a real one's watcher has; the store is the
real one, `dtrain store`, in a process of its own. All of them share this machine's processors. torch looks up the name
of every address that it connects to: where nobody answers, that takes longest of all.

    python benchmarks/store.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
import tyro

from dtrain.elastic import generation
from dtrain.elastic.generation import Group, Outcome
from dtrain.elastic.page import Page
from dtrain.elastic.placement import Placement

PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count requests to the store, and time what is waited for."""

    supervisors: str = "8,64,512"
    """Numbers of supervisors, eight to a node."""

    idle_s: float = 10.0
    """How long nothing happens."""


class Counted:
    """A store of which every request is counted."""

    requests: ClassVar[Counter[str]] = Counter()

    def __init__(self, prefix: str, store: Any) -> None:
        self._store = dist.PrefixStore(prefix, store)

    def __getattr__(self, name: str) -> Any:
        Counted.requests[name] += 1
        return getattr(self._store, name)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(supervisors: int, port: int, pid: int, idle_s: float) -> None:
    nodes = max(1, supervisors // PER_NODE)
    groups: dict[int, Group] = {}
    woken: list[float] = []

    def form(rank: int) -> None:
        node, local_rank = divmod(rank, supervisors // nodes)
        place = Placement(
            rank, supervisors, local_rank, ("127.0.0.1", port), job=str(supervisors), node=node, nodes=nodes
        )
        groups[rank] = Group(place, 120)

    def watch(rank: int) -> None:
        if groups[rank].placement.local_rank == 0 and nodes > 1:
            threading.Thread(target=groups[rank].beat, args=(Page.shared(),), daemon=True).start()
        groups[rank].watch(0)
        woken.append(time.monotonic())

    def all_at_once(work: Any) -> list[threading.Thread]:
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(supervisors)]
        for thread in threads:
            thread.start()
        return threads

    begun = time.monotonic()
    for thread in all_at_once(form):
        thread.join()
    formed_s = time.monotonic() - begun
    watchers = all_at_once(watch)
    time.sleep(3)
    before, used = Counted.requests.total(), cpu_s(pid)
    time.sleep(idle_s)
    requests, used = (Counted.requests.total() - before) / idle_s, (cpu_s(pid) - used) / idle_s
    settled = time.monotonic()
    groups[supervisors // 2].settle(0, Outcome(kind="done"))
    for watcher in watchers:
        watcher.join()
    first, last = (1000 * (when - settled) for when in (min(woken), max(woken)))
    print(
        f"{supervisors:11} {nodes:6} {formed_s:9.2f} {requests:11.1f} {requests / supervisors:9.2f} {used:11.1%} "
        f"{first:9.1f} {last:9.1f}"
    )


def main(o: Options) -> None:
    vars(generation)["dist"] = Counting()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "dtrain.cli.main", "store", "--port", str(port)]
    store = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert store.stdout is not None
        store.stdout.readline()
        print("                    idle, each second:                    told of a failure, ms")
        print("supervisors  nodes  formed, s   requests    a rank   processor     first      last")
        for supervisors in map(int, o.supervisors.split(",")):
            measure(supervisors, port, store.pid, o.idle_s)
    finally:
        store.terminate()
        store.wait()


class Counting:
    """torch.distributed, but for the stores' requests, which are counted."""

    PrefixStore = Counted

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


if __name__ == "__main__":
    main(tyro.cli(Options))
