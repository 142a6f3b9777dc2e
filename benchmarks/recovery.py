"""From a kill to the first new step: dtrain beside the same job written by hand on torchrun and DCP.

Both train the GPT of dtrain.examples.gpt with the same options, and save every 10 steps. While a job trains, one of its
ranks is killed with SIGKILL, a few steps after a checkpoint; measured is the time from the kill to the end of the first
step that is new. A part of it is the steps that have to be done again, which is a matter of how often a job saves; the
rest, without them, is the cost of the recovery itself (the first new step included).

    python benchmarks/recovery.py

The jobs run in turn. The one written by hand is `by_hand_recovery.py`.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from dtrain.observe.events import EVENTS, METRICS, read_lines

SAVE_EVERY = 10
DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time recoveries of dtrain and of a job that is written by hand, in turn."""

    nproc: int = 2
    """Processes."""

    kills: int = 5
    """Kills of each job; each in a job of its own."""

    seed: int = 0
    """Chooses the ranks that are killed, and when."""


@dataclass(frozen=True)
class Recovery:
    """What one kill cost."""

    total_s: float
    """From the kill to the end of the first new step."""
    replayed: int
    """Steps that were done again."""
    step_s: float
    """Median time of a step."""

    @property
    def itself_s(self) -> float:
        return self.total_s - self.replayed * self.step_s


@dataclass(frozen=True)
class Line:
    """A finished step."""

    time: float
    step: int


class Job:
    """A job under torchrun, in a folder of its own."""

    command: tuple[str, ...]

    def __init__(self, folder: Path, nproc: int) -> None:
        self.folder = folder
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "--max-restarts=5"]
        environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": self.own_store} | os.environ
        self.process = subprocess.Popen(
            [sys.executable, *torchrun, *self.command, "--dir", str(folder), "--save-every", str(SAVE_EVERY)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    own_store = "0"

    def steps(self) -> list[Line]:
        """The finished steps of one rank, in the order of time."""
        raise NotImplementedError

    def pid(self, rank: int) -> int:
        """The process that trains as this rank."""
        raise NotImplementedError

    def recovered(self, killed: float) -> tuple[float, int] | None:
        """When the first new step after the kill ended, and how many were done again; None as long as it hasn't."""
        raise NotImplementedError

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


class Dtrain(Job):
    command = ("-m", "dtrain.examples.gpt", "--steps", "1000")

    def _events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / EVENTS) if line["event"] == event]

    def steps(self) -> list[Line]:
        return [Line(line["time"], line["step"]) for line in read_lines(self.folder / METRICS)]

    def pid(self, rank: int) -> int:
        return int([event for event in self._events("started") if event["rank"] == rank][-1]["pid"])

    def recovered(self, killed: float) -> tuple[float, int] | None:
        new = [event for event in self._events("caught_up") if event["time"] > killed]
        if not new:
            return None
        restored = [event for event in self._events("restored") if event["time"] > killed]
        return new[0]["time"], new[0]["step"] - 1 - restored[0]["step"]


class ByHand(Job):
    command = (str(Path(__file__).with_name("by_hand_recovery.py")), "--steps", "1000")
    # Otherwise all attempts share one store, and a new one finds the addresses of the dead.
    own_store = "1"

    def _lines(self, rank: int) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / "steps.jsonl") if line["rank"] == rank]

    def steps(self) -> list[Line]:
        return [Line(line["time"], line["step"]) for line in self._lines(0)]

    def pid(self, rank: int) -> int:
        return int(self._lines(rank)[-1]["pid"])

    def recovered(self, killed: float) -> tuple[float, int] | None:
        lines = self.steps()
        back = next((i for i, (a, b) in enumerate(itertools.pairwise(lines), 1) if b.step <= a.step), None)
        if back is None:
            return None
        best = lines[back - 1].step
        new = [line for line in lines[back:] if line.step > best]
        return (new[0].time, best + 1 - lines[back].step) if new else None


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    sys.exit(f"{what}: not within {DEADLINE_S:.0f} s")


def recover(kind: type[Job], nproc: int, target: int, rank: int) -> Recovery:
    """Start a job, kill a rank of it after a step, and wait for the first new step."""
    with tempfile.TemporaryDirectory() as folder:
        job = kind(Path(folder), nproc)
        try:
            wait_for(lambda: [line for line in job.steps() if line.step >= target], f"step {target}")
            pid = job.pid(rank)
            killed = time.time()
            os.kill(pid, signal.SIGKILL)
            new_step, replayed = wait_for(lambda: job.recovered(killed), "a new step")
            lines = job.steps()
        finally:
            job.end()
    gaps = [b.time - a.time for a, b in itertools.pairwise(lines) if b.step == a.step + 1 and a.step > 10]
    return Recovery(new_step - killed, replayed, statistics.median(gaps))


def main(o: Options) -> None:
    dice = random.Random(o.seed)
    print(f"{o.nproc} processes, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print(
        f"{'job':8} {'kill to new step, s':>20} {'steps replayed':>15} {'one step, s':>12} {'recovery itself, s':>19}"
    )
    found: dict[str, list[Recovery]] = {"dtrain": [], "by hand": []}
    for _ in range(o.kills):
        target = 3 * SAVE_EVERY + dice.randint(2, SAVE_EVERY - 3)
        rank = dice.randrange(o.nproc)
        for name, kind in (("dtrain", Dtrain), ("by hand", ByHand)):
            r = recover(kind, o.nproc, target, rank)
            found[name].append(r)
            print(f"{name:8} {r.total_s:20.2f} {r.replayed:15d} {r.step_s:12.3f} {r.itself_s:19.2f}", flush=True)
    itself = {name: statistics.median(r.itself_s for r in taken) for name, taken in found.items()}
    total = {name: statistics.median(r.total_s for r in taken) for name, taken in found.items()}
    for name in found:
        print(f"median   {name:8}: {total[name]:.2f} s, of which the recovery itself {itself[name]:.2f} s")
    print(
        f"ratio dtrain / by hand: {total['dtrain'] / total['by hand']:.3f}, "
        f"of the recovery itself {itself['dtrain'] / itself['by hand']:.3f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
