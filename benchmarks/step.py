"""What dtrain adds to a step: its loop beside the same loop written by hand, and beside those of other frameworks.

All train the same model on the same data in the same processes, a step of each in turn, so that whatever else the
machine does falls on all. dtrain's time is the whole turn of its loop: random state, data, the numbers that ranks
exchange, guards, metrics and progress line, but no checkpoint and no snapshot: these take 1% of the time by default,
but here that would be 1% of all loops' time together, at the cost of dtrain's alone. The comparison of the ranks'
copies of the parameters, which dtrain makes every 100 steps, is timed by itself. See step_peers.py for the others.

The second table is what `reduction="exact"` costs: runs with it and without it, in turn, each measured by the loop that
is written by hand in the same run.

    python benchmarks/step.py                        2 processes on this machine
    python benchmarks/step.py --layouts fsdp --sizes large --exact ""
    python benchmarks/step.py --sizes "" --steps 50
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from step_peers import LR, WARMUP, ByHand, peers_of

import dtrain
from dtrain.examples.corpus import Windows, collate, read_corpus
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT

LAYERS = {"small": 2, "medium": 4, "large": 6}
"""With two processes on two cores, steps of roughly 60, 120 and 170 ms."""
COMPARED = "copies compared"
"""What the ranks' copies of the parameters are compared by, every 100 steps."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time dtrain's steps and those of other loops, in turn; lists are given with commas."""

    layouts: str = "ddp,fsdp"
    """How the model is spread."""

    sizes: str = "small,large"
    """Of the model; none leaves the loops out."""

    nproc: int = 2
    """Processes."""

    exact: str = "1,2,3,4"
    """Numbers of processes for the cost of exact sums; none leaves that out."""

    steps: int = 100
    """Steps of each loop."""

    warm: int = 20
    """Steps at the start that aren't counted: memory is still being allocated there."""

    repeats: int = 2
    """Runs of each kind."""

    global_batch: int = 16
    """Windows of text in a step, over all processes together."""

    micro_batch: int = 4
    """Windows of text in one forward and backward pass."""

    context: int = 128
    """Bytes in a window."""


@dataclass(frozen=True)
class Kind:
    """Of a run."""

    layout: str
    size: str
    ranks: int
    reduction: str = "fast"
    peers: bool = True
    """Whether all others take part, or only the loop that is written by hand."""


def measure(run: dtrain.Run, o: Options, kind: Kind) -> None:
    """All loops in turn; rank 0 prints their times, in ms, as a line of JSON."""
    dataset = Windows(read_corpus(), o.context)
    accumulate = max(1, o.global_batch // (o.micro_batch * dist.get_world_size()))

    def gpt() -> GPT:
        return GPT(layers=LAYERS[kind.size], heads=4, width=128, dropout=0.1)

    model = run.parallelize(gpt())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = warmup_cosine(optimizer, warmup=WARMUP, steps=1000)
    data = run.data(dataset, collate=collate)
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    known = peers_of(kind.layout, run.device) if kind.peers else {"by hand": ByHand}
    others = {
        name: peer(gpt(), kind.layout, dataset, o.micro_batch, accumulate, run.device) for name, peer in known.items()
    }

    times: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter()

    def lap() -> float:
        nonlocal clock
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        before, clock = clock, time.perf_counter()
        return 1e3 * (clock - before)

    def others_in(turn: range) -> None:
        for number in turn:
            name = list(others)[(number + step.number) % len(others)]
            others[name].step()
            times[name].append(lap())

    for step in run.steps(o.steps):
        between = lap()  # what the loop did between its bodies
        if times["dtrain"]:
            times["dtrain"][-1] += between
        before = step.number % (len(others) + 1)  # dtrain has each turn among the others
        others_in(range(before))
        for x, y in step.micro_batches(data):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
            step.backward(loss, count=y.numel())
        step.update(optimizer, schedule, clip=1.0)
        times["dtrain"].append(lap())
        others_in(range(before, len(others)))
        lap()
        if kind.layout == "ddp":
            run._loop._copies.compare(-step.number)  # of no step that the run compares itself
            times[COMPARED].append(lap())
    if run.is_first:
        print(json.dumps({name: taken[o.warm :] for name, taken in times.items()}), flush=True)


def times_of(o: Options, kind: Kind) -> dict[str, list[float]]:
    """Of one run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        # fmt: off
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={kind.ranks}",
            __file__, "--measure", json.dumps(vars(kind)), folder, *sys.argv[1:],
        ]
        # fmt: on
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(ours: list[float], theirs: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:7.3f}   {f'{low:.3f} to {high:.3f}':>16}"


def main(o: Options) -> None:
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"python benchmarks/step.py {' '.join(sys.argv[1:])}".rstrip())
    if o.sizes:
        show_loops(o)
    if o.exact:
        show_exact(o)


def show_loops(o: Options) -> None:
    print(f"\n{o.nproc} processes; medians of {o.repeats} x {o.steps - o.warm} steps of each, in turn")
    print("ratio: median, and middle half, of each round's step beside that of the loop written by hand\n")
    print(f"{'layout':7} {'model':7} {'loop':11} {'ms':>7} {'ratio':>7}   {'middle half':>16}")
    for layout in filter(None, o.layouts.split(",")):
        for size in o.sizes.split(","):
            found: dict[str, list[float]] = defaultdict(list)
            for _ in range(o.repeats):
                for name, taken in times_of(o, Kind(layout, size, o.nproc)).items():
                    found[name] += taken
            compared = found.pop(COMPARED, [])
            for name, taken in found.items():
                cells = "" if name == "by hand" else ratios(taken, found["by hand"])
                print(f"{layout:7} {size:7} {name:11} {statistics.median(taken):7.1f} {cells}".rstrip(), flush=True)
            if compared:
                cost = statistics.median(compared)
                share = cost / (100 * statistics.median(found["dtrain"]))
                print(f"{layout:7} {size:7} comparing the copies: {cost:.2f} ms, {share:.3%} of 100 steps", flush=True)


def show_exact(o: Options) -> None:
    print('\nreduction="exact" beside "fast": a step of dtrain, in steps of the loop written by hand in the same run')
    print(f"(medium model, {o.repeats} x {o.steps - o.warm} steps; 3 and 4 processes share two cores)\n")
    print(f"{'layout':7} {'ranks':>5} {'by hand, ms':>12} {'fast':>7} {'exact':>7} {'exact/fast':>11}")
    for layout in filter(None, o.layouts.split(",")):
        for ranks in map(int, o.exact.split(",")):
            found: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for _ in range(o.repeats):
                for reduction in ("fast", "exact"):
                    times = times_of(o, Kind(layout, "medium", ranks, reduction, peers=False))
                    found[reduction] += zip(times["dtrain"], times["by hand"], strict=True)
            by_hand = statistics.median(b for pairs in found.values() for _, b in pairs)
            fast, exact = (statistics.median(a / b for a, b in found[name]) for name in ("fast", "exact"))
            print(f"{layout:7} {ranks:5} {by_hand:12.1f} {fast:7.3f} {exact:7.3f} {exact / fast:11.3f}", flush=True)


def measured_process(kind: Kind, folder: str, o: Options) -> None:
    """What each of the processes that `main` starts does."""
    options: dict[str, Any] = {"parallel": kind.layout, "reduction": kind.reduction, "snapshot_every": "10h"}
    config = dtrain.Config(
        dir=folder, global_batch=o.global_batch, micro_batch=o.micro_batch, save_every="10h", unit="tokens", **options
    )
    dtrain.launch(lambda run: measure(run, o, kind), config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measured_process(Kind(**json.loads(sys.argv[2])), sys.argv[3], tyro.cli(Options, args=sys.argv[4:]))
    else:
        main(tyro.cli(Options))
