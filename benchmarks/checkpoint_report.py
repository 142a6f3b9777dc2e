"""What `checkpoint.py` has found, as tables, and held against what is promised."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from checkpoint_options import Options
from checkpoint_world import MIB


@dataclass
class Figures:
    """What one engine, or the limits, needed in each round, in seconds; of all ranks the slowest."""

    stall: list[float] = field(default_factory=list)
    """Of the limits: the copy; `durable` and `load` are then the plain write and read."""
    durable: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    """By each rank in a load, as the kernel counts what was read from files; mapped files don't count."""
    remark: str = ""


@dataclass
class Beside:
    """Steps beside a save, of the slowest rank."""

    slower: float
    """1 is twice as slow."""
    save_s: float
    steps: int


class Promises:
    """What is promised, and whether it is kept everywhere."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[str, float, float]]] = {}

    def add(self, what: str, where: str, value: float, bound: float) -> None:
        """:param bound: the most that the value may be; the least, where `what` says so by a `>=`."""
        self._found.setdefault(what, []).append((where, value, bound))

    def print(self) -> None:
        print("\npromised of dtrain" + " " * 49 + "kept in      worst")
        for what, found in self._found.items():
            sign = -1 if ">=" in what else 1
            kept = [sign * value <= sign * bound for _, value, bound in found]
            where, value, _ = max(found, key=lambda one: sign * one[1] / one[2])
            print(f"{what:66} {f'{sum(kept)} of {len(kept)}':9} {value:7.2f} in {where}".rstrip())


def middle(times: list[float]) -> float:
    return statistics.median(times) if times else float("nan")


def print_rounds(o: Options, where: str, figures: Mapping[str, Figures], nbytes: int) -> None:
    limit = figures["limit"]
    copy, write, read = middle(limit.stall), middle(limit.durable), middle(limit.load)
    gb = nbytes / 1e9
    print(f"\n{where}: medians of {o.rounds}; ratios to the limits copy, plain write with fsync, plain read")
    print(f"{'':24}{'stall, ms':>10}{'/ copy':>8}{'durable, s':>12}{'GB/s':>7}{'/ write':>9}", end="")
    print(f"{'load, s':>9}{'GB/s':>7}{'/ read':>8}  {'bytes read by a rank':20}")
    for name, taken in figures.items():
        stall, durable, load = middle(taken.stall), middle(taken.durable), middle(taken.load)
        print(f"{name:24}{1e3 * stall:10.1f}{stall / copy:8.2f}", end="")
        print(f"{durable:12.3f}{gb / durable:7.2f}{durable / write:9.2f}", end="")
        if taken.load:
            print(f"{load:9.3f}{gb / load:7.2f}{load / read:8.2f}", end="")
            print("  " + ", ".join(f"{100 * b / nbytes:.0f}%" for b in taken.read_bytes), end="")
        print(f"  ({taken.remark})" if taken.remark else "", flush=True)


def judge_rounds(o: Options, where: str, figures: Mapping[str, Figures], nbytes: int, promises: Promises) -> None:
    limit, ours = figures["limit"], figures["dtrain"]
    copy, write, read = middle(limit.stall), middle(limit.durable), middle(limit.load)
    stall = middle(ours.stall)
    if o.wanted("stall"):
        kept = min(middle(figures[name].stall) for name in figures if "kept" in name)
        promises.add("stall / copy <= 1.5", where, stall / copy, 1.5)
        promises.add("stall / async_save's with a stager kept <= 0.6", where, stall / kept, 0.6)
        promises.add("stall / async_save's <= 0.25", where, stall / middle(figures["dcp.async_save"].stall), 0.25)
    if o.wanted("durable"):
        promises.add("speed of durable save / plain write's >= 0.85", where, write / middle(ours.durable), 0.85)
    if o.wanted("load"):
        promises.add("speed of load / plain read's >= 0.7", where, read / middle(ours.load), 0.7)
        stock = middle(figures["dcp.save"].load)
        promises.add("speed of load / dcp.load's >= 3", where, stock / middle(ours.load), 3.0)
        if len(ours.read_bytes) > 1 and o.layout == "sharded":
            share = max(ours.read_bytes) * len(ours.read_bytes) / nbytes
            promises.add("bytes read by a rank / its own <= 1.05", where, share, 1.05)


def print_beside(where: str, found: Mapping[str, Beside | None], promises: Promises) -> None:
    print(f"\n{where}: steps while a save is under way")
    for name, one in found.items():
        text = "saves in the foreground alone"
        if one is not None:
            text = f"{100 * one.slower:6.1f}% slower   save takes {one.save_s:6.2f} s   ({one.steps} steps)"
        print(f"{name:24}{text}", flush=True)
    if (ours := found["dtrain"]) is not None:
        promises.add("slowdown of steps beside a save, % <= 10", where, 100 * ours.slower, 10)


def print_memory(where: str, grown: Mapping[str, int], nbytes: int, ranks: int, promises: Promises) -> None:
    print(f"\n{where}: peak memory beyond the training's own, while saving")
    for name, held in grown.items():
        print(f"{name:24}{held / MIB:8.0f} MiB = {held / nbytes:5.2f} x the state", flush=True)
    bound = 2 * nbytes / MIB + 64 * ranks
    promises.add("peak memory / (two snapshots and 64 MiB a rank) <= 1", where, grown["dtrain"] / MIB / bound, 1.0)
