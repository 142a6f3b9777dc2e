"""What dtrain adds to a step: its loop beside the same loop written by hand on DDP.

Both train the same model on the same data in the same processes, a step of one and a step of the other in turn, so
that whatever else the machine does falls on both. The hand-written loop is the ordinary one, written well: a
DistributedSampler and a DataLoader, no exchange of gradients before a step's last micro-batch, a mean loss, clipping,
AdamW, a schedule; it saves nothing and shows nothing. dtrain's time is the whole turn of its loop: random state, data,
the numbers that ranks exchange, metrics and progress line, but no checkpoint.

    python benchmarks/step.py            2 processes on this machine, three sizes
    python benchmarks/step.py --nproc 1
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dtrain
from dtrain.examples.corpus import Windows, collate, read_corpus
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT

LAYERS = {"small": 2, "medium": 4, "large": 6}
"""With two processes on two cores, steps of roughly 60, 120 and 170 ms."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time dtrain's steps and those of a loop that is written by hand, in turn."""

    nproc: int = 2
    """Processes."""

    steps: int = 120
    """Steps of each loop."""

    warm: int = 20
    """Steps at the start that aren't counted: memory is still being allocated there."""

    repeats: int = 2
    """Runs of each size."""

    global_batch: int = 16
    """Windows of text in a step, over all processes together."""

    micro_batch: int = 4
    """Windows of text in one forward and backward pass."""

    context: int = 128
    """Bytes in a window."""


class ByHand:
    """The loop that is written by hand."""

    def __init__(self, o: Options, layers: int, dataset: Windows, device: torch.device) -> None:
        self.device = device
        self.accumulate = o.global_batch // (o.micro_batch * dist.get_world_size())
        sampler: DistributedSampler[int] = DistributedSampler(dataset, shuffle=True, drop_last=True)
        loader = DataLoader(
            dataset, batch_size=o.micro_batch, sampler=sampler, num_workers=0, collate_fn=collate, drop_last=True
        )
        self.batches = self._endless(loader, sampler)
        self.model = DistributedDataParallel(GPT(layers=layers, heads=4, width=128, dropout=0.1).to(device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = warmup_cosine(self.optimizer, warmup=20, steps=o.steps)

    @staticmethod
    def _endless(loader: DataLoader[Tensor], sampler: DistributedSampler[int]) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    def step(self) -> None:
        for micro_batch in range(self.accumulate):
            x, y = (part.to(self.device, non_blocking=True) for part in next(self.batches))
            last = micro_batch == self.accumulate - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                logits = self.model(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / self.accumulate
                loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(run: dtrain.Run, o: Options, layers: int) -> None:
    """Both loops in turn; rank 0 prints their times, in ms, as a line of JSON."""
    dataset = Windows(read_corpus(), o.context)
    by_hand = ByHand(o, layers, dataset, run.device)
    model = run.parallelize(GPT(layers=layers, heads=4, width=128, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = warmup_cosine(optimizer, warmup=20, steps=o.steps)
    data = run.data(dataset, collate=collate)
    run.track(model=model, optimizer=optimizer, schedule=schedule)

    times: dict[str, list[float]] = {"dtrain": [], "by hand": []}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        times[name].append(1e3 * (now - clock))
        clock = now

    for step in run.steps(o.steps):
        for x, y in step.micro_batches(data):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
            step.backward(loss, count=y.numel())
        step.update(optimizer, schedule, clip=1.0)
        lap("dtrain")
        by_hand.step()
        lap("by hand")
    if run.is_first:
        print(json.dumps({name: taken[o.warm :] for name, taken in times.items()}), flush=True)


def main(o: Options) -> None:
    print(f"{o.nproc} processes, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(
        f"medians of {o.repeats} x {o.steps - o.warm} pairs of steps; ratio = median of dtrain / by hand, pair by pair"
    )
    print(f"{'model':8} {'by hand, ms':>12} {'dtrain, ms':>12} {'ratio':>7}   {'middle half of ratios':>22}")
    for size in LAYERS:
        pairs: list[tuple[float, float]] = []
        for _ in range(o.repeats):
            with tempfile.TemporaryDirectory() as folder:
                # fmt: off
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={o.nproc}",
                    __file__, "--measure", size, folder, *sys.argv[1:],
                ]
                # fmt: on
                environment = {"OMP_NUM_THREADS": "1"} | os.environ
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(done.stderr)
            times = json.loads(done.stdout.splitlines()[-1])
            pairs += zip(times["by hand"], times["dtrain"], strict=True)
        by_hand, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        print(f"{size:8} {by_hand:12.1f} {ours:12.1f} {ratio:7.3f}   {f'{low:.3f} to {high:.3f}':>22}", flush=True)


def measured_process(size: str, folder: str, o: Options) -> None:
    """What each of the processes that `main` starts does."""
    config = dtrain.Config(
        dir=folder, global_batch=o.global_batch, micro_batch=o.micro_batch, save_every="10h", unit="tokens"
    )
    dtrain.launch(lambda run: measure(run, o, LAYERS[size]), config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measured_process(sys.argv[2], sys.argv[3], tyro.cli(Options, args=sys.argv[4:]))
    else:
        main(tyro.cli(Options))
