"""A small training script, run by the tests as a user would run it: `python small_job.py DIR [--option ...]`.

What goes wrong in it is asked for by options. It prints one line a step on rank 0: `step N LOSS`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

import dtrain
from dtrain.errors import ConfigError


class Rows:
    """Of which one may have something wrong with it."""

    def __init__(self, samples: torch.Tensor) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == args.stuck_sample:
            trouble("sleep")
        return self._samples[index]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(100))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", default="2")
    parser.add_argument("--snapshot-every", default="auto")
    parser.add_argument("--option", nargs=2, action="append", default=[], help="of the config: its name and value")
    parser.add_argument("--best-step", type=int, default=0, help="save every step, with its distance from this one")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--first-sample", type=float, default=0.0)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--fail-at", type=int, default=-1, help="step of an exception; 0 is before the first")
    parser.add_argument("--fail-rank", type=int, default=0)
    parser.add_argument("--exit-at", type=int, default=-1)
    parser.add_argument("--lives-steps", type=int, default=0, help="every trainer fails after so many steps")
    parser.add_argument("--kill-supervisor-at", type=int, default=-1, help="rank 1's, once")
    parser.add_argument("--trouble", default="", help="what happens before the forward pass, once: see `trouble`")
    parser.add_argument("--trouble-at", type=int, default=4)
    parser.add_argument("--trouble-rank", type=int, default=1)
    parser.add_argument("--poison-step", type=int, default=-1, help="its first micro-batch kills whoever computes it")
    parser.add_argument("--body-s", type=float, default=0.0, help="rank 0 is at work in the loop's body for so long")
    parser.add_argument("--stuck-sample", type=int, default=-1, help="can't be loaded, once")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--late-s", type=float, default=0.0, help="the first process here starts so much later")
    for flag in ("--trouble-behind", "--thread", "--iterable", "--in-place", "--say-end"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def fail(step: int, rank: int) -> None:
    raise ArithmeticError(f"planted at step {step} on rank {rank}")


def trouble(kind: str) -> None:
    """The first time that it comes to this."""
    try:
        Path(args.dir, "troubled").touch(exist_ok=False)
    except FileExistsError:
        return
    match kind:
        case "spin":
            sum(itertools.repeat(0))  # never lets another thread run
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
        case "sleep":
            time.sleep(1000)
        case "collective":
            dist.barrier()  # the others don't come


def main(run: dtrain.Run) -> None:
    def maybe(step: int) -> None:
        if step == args.fail_at and run.rank == args.fail_rank:
            fail(step, run.rank)
        if step == args.exit_at:
            sys.exit(7)

    model = run.parallelize(nn.Linear(args.width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(args.samples, args.width, generator=generator)
    samples[:1, :1] += args.first_sample
    dataset: Any = Endless() if args.iterable else Rows(samples)
    data = run.data(dataset, workers=args.workers)
    run.track(model=model, optimizer=optimizer)
    maybe(0)
    for lived, step in enumerate(run.steps(args.steps), 1):
        maybe(step.number)
        if args.lives_steps and lived > args.lives_steps and run.is_first:
            fail(step.number, run.rank)
        if step.number == args.kill_supervisor_at and run.rank == 1:
            trouble("orphan")
        at = step.number == args.trouble_at and run.rank == args.trouble_rank
        if at and args.trouble == "leave":
            return
        for x in step.micro_batches(data):
            if at and not args.trouble_behind:
                trouble(args.trouble)
            if at or args.trouble_at == 0:
                time.sleep(args.trouble == "slow" and run.rank == args.trouble_rank and 0.05)
            if step.number == args.poison_step:
                os.kill(os.getpid(), signal.SIGKILL)
            step.backward(model(x).square().sum(), count=len(x))
            if at and args.trouble_behind:
                trouble(args.trouble)
        step.update(optimizer)
        time.sleep(args.step_s)
        for _ in range(int(10 * args.body_s) if run.is_first else 0):
            time.sleep(0.1)
            run.alive()
        if run.is_first:
            print(f"step {step.number} {step.loss}", flush=True)
        if args.best_step:
            run.save(metrics={"distance": abs(step.number - args.best_step)})
    if args.say_end:
        print("behind the loop", flush=True)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    args = parsed()
    options: dict[str, Any] = {
        "dir": args.dir,
        "global_batch": args.global_batch,
        "micro_batch": args.micro_batch,
        "seed": args.seed,
        "save_every": args.save_every,
        "snapshot_every": args.snapshot_every,
    }
    options |= {name: _value(value) for name, value in args.option}
    if "keep_best" in options:
        options["keep_best"] = dtrain.Best(options["keep_best"])
    try:
        config = dtrain.Config(**options)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
    if os.environ.get("LOCAL_RANK") == "0":
        time.sleep(args.late_s)
    if args.thread:
        threading.Thread(target=time.sleep, args=(60,), daemon=True, name="early bird").start()
    dtrain.launch(main, config, in_place=args.in_place)
    Path(args.dir, "came-back").touch()
