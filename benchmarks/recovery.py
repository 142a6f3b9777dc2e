"""From a fault to the end of the first new step: dtrain beside the same job written by hand, with Fabric, with torchft.

All train the GPT of dtrain.examples.gpt with the same options, and save every 10 steps; dtrain also takes a snapshot
in memory at each, and on nodes sends it to another one. While a job trains, something
is done to it; measured is the time from then to the end of the first step that is new. A part of it is the steps that
have to be done again, which is a matter of how often a job saves; `itself` is without them (the first new step
included). Where processes die, there are two of them under one torchrun; where nodes do, there are three of one process
each, in network namespaces (see `dtrain nodes`), with the same rendezvous settings for both jobs.

    python benchmarks/recovery.py

The jobs run in turn. Those beside dtrain are `by_hand_recovery.py`, `fabric_recovery.py` and `torchft_recovery.py`;
none of them notices a rank that hangs. torchft's two processes have a torchrun each. When one of them is killed, its
first new step may be one of the other alone, with half of the samples.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from dtrain.cli.nodes import Nodes, agent
from dtrain.observe.events import EVENTS, METRICS, read_lines

SAVE_EVERY = 10
HANG_AFTER_S = 2.0
DEADLINE_S = 120.0
PHASES = ("notice", "start", "load", "step")
BATCH = ("--global-batch", "24", "--micro-batch", "4")
"""Of the jobs on nodes: six micro-batches, for two ranks as for three."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time recoveries of dtrain and of others, in turn."""

    jobs: str = "dtrain,by hand,Fabric,torchft"
    """The last two for killed processes only."""

    faults: str = "rank,ranks,hang,node,back,first,spare"
    """What is done: a rank or all of them are killed, a rank is stopped, a node or the first one is killed, a node
    comes back, a spare steps in."""

    times: int = 10
    """How often each."""

    seed: int = 0
    """Chooses the ranks, the nodes, and when."""


@dataclass(frozen=True)
class Recovery:
    """What one fault cost."""

    total_s: float
    """From the fault to the end of the first new step."""
    replayed: int
    """Steps that were done again."""
    step_s: float
    """Median time of a step before."""
    phases_s: tuple[float, ...] = ()
    """Of `PHASES`, as far as the job says: until the fault was noticed, until the first trainer was there again, until
    the state was loaded, until the step's end."""

    @property
    def itself_s(self) -> float:
        return self.total_s - self.replayed * self.step_s


class Job:
    """A training, under one torchrun or on several nodes."""

    command: tuple[str, ...]
    steps_file: str
    own_store = "0"
    on_nodes: tuple[str, ...] = ()

    def __init__(self, folder: Path, nodes: Nodes | None, least: int = 2, most: int = 3) -> None:
        self.folder = folder
        self.nodes = nodes
        self._limits = {"least": least, "most": most}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._output = (folder / "output.txt").open("ab")

    def begin(self, *nodes: int) -> None:
        arguments = [*self.command, "--dir", str(self.folder), "--steps", "100000", "--save-every", str(SAVE_EVERY)]
        if self.nodes is not None:
            arguments += (*BATCH, *self.on_nodes)
            for node in nodes or range(self.nodes.count):
                self.nodes.start(node, agent(self.nodes, node, arguments, **self._limits), {}, self._output)
            return
        self._torchrun(2, arguments, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": self.own_store})

    def _torchrun(self, nproc: int, arguments: list[str], env: dict[str, str]) -> None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "--max-restarts=100")
        self._popen([sys.executable, *torchrun, *arguments], {"OMP_NUM_THREADS": "1"} | env)

    def _popen(self, command: list[str], env: dict[str, str]) -> None:
        output = self._output
        self._processes.append(subprocess.Popen(command, env=env | os.environ, stdout=output, stderr=output))

    def end(self) -> None:
        for process in self._processes:
            process.terminate()  # killed, it would leave the other job's processes at work
        for process in self._processes:
            process.wait()

    def steps(self) -> list[tuple[float, int]]:
        """The finished steps, with the times of their ends."""
        return sorted((line["time"], line["step"]) for line in read_lines(self.folder / self.steps_file))

    def step_times(self) -> list[float]:
        """Of all steps that a process has finished after another one."""
        lines = self.steps()
        return [b[0] - a[0] for a, b in itertools.pairwise(lines) if b[1] == a[1] + 1]

    def counted(self, begin: float, end: float) -> float:
        """The steps that were new when they ended in this time."""
        before = max(step for when, step in self.steps() if when <= begin)
        return max(step for when, step in self.steps() if when <= end) - before

    def whole(self) -> bool:
        """Whether all that have died take part again."""
        return True

    def lives(self) -> dict[int, dict[str, Any]]:
        """Where each rank trains, and by which process."""
        raise NotImplementedError

    def pids(self) -> dict[int, int]:
        return {rank: line["pid"] for rank, line in self.lives().items()}

    def node_of(self, rank: int) -> int:
        return int(self.lives()[rank]["host"].removeprefix("node"))

    def born(self, since: float) -> float:
        """When the first trainer came up after a fault; 0 if none has yet."""
        raise NotImplementedError

    def phases(self, since: float) -> tuple[float, ...]:
        """When each of `PHASES` but the last was over."""
        return ()


class Dtrain(Job):
    command = ("-m", "dtrain.examples.gpt", "--snapshot-every", "1", "--hang-after-s", str(HANG_AFTER_S))
    steps_file = METRICS
    on_nodes = ("--replicate-snapshots", "1")

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / EVENTS) if line["event"] in kinds]

    def lives(self) -> dict[int, dict[str, Any]]:
        return {event["rank"]: event for event in self.events("started")}

    def born(self, since: float) -> float:
        return min((event["time"] for event in self.events("started") if event["time"] > since), default=0.0)

    def phases(self, since: float) -> tuple[float, ...]:
        born = self.born(since)
        noticed = [event["time"] for event in self.events("failed", "lost") if since < event["time"] < born]
        loaded = [event["time"] for event in self.events("restored") if event["time"] > born]
        return (max(noticed, default=since), born, min(loaded, default=born))


class ByHand(Job):
    command = (str(Path(__file__).with_name("by_hand_recovery.py")),)
    steps_file = "steps.jsonl"
    # Otherwise all attempts share one store, and a new one finds the addresses of the dead.
    own_store = "1"

    def lines(self) -> list[dict[str, Any]]:
        return list(read_lines(self.folder / self.steps_file))

    def step_times(self) -> list[float]:
        lines = sorted((*self._life(line), line["step"], line["time"]) for line in self.lines())
        return [b[-1] - a[-1] for a, b in itertools.pairwise(lines) if b[:-2] == a[:-2] and b[-2] == a[-2] + 1]

    def lives(self) -> dict[int, dict[str, Any]]:
        return {line["rank"]: line for line in self.lines()}

    def born(self, since: float) -> float:
        lines = self.lines()
        lives = {self._life(line) for line in lines if line["time"] <= since}
        return min((line["time"] for line in lines if self._life(line) not in lives), default=0.0)

    def _life(self, line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in ("host", "pid"))


class Fabric(ByHand):
    command = (str(Path(__file__).with_name("fabric_recovery.py")),)


class Torchft(ByHand):
    command = (str(Path(__file__).with_name("torchft_recovery.py")),)

    def begin(self, *nodes: int) -> None:
        arguments = [*self.command, "--dir", str(self.folder), "--steps", "100000", "--save-every", str(SAVE_EVERY)]
        with socket.socket() as found:
            found.bind(("", 0))
            port = found.getsockname()[1]
        lighthouse = str(Path(sys.executable).with_name("torchft_lighthouse"))
        self._popen([lighthouse, "--bind", f"[::]:{port}", "--min_replicas", "1", "--join_timeout_ms", "1000"], {})
        for replica in range(2):
            env = {"REPLICA": str(replica), "TORCHFT_LIGHTHOUSE": f"http://localhost:{port}"}
            self._torchrun(1, arguments, env)

    def counted(self, begin: float, end: float) -> float:
        """A step of one replica alone is half of one."""
        of: dict[int, int] = {line["step"]: line["of"] for line in self.lines() if begin < line["time"] <= end}
        return sum(of.values()) / 2

    def whole(self) -> bool:
        last = {line["rank"]: line for line in self.lines()}
        return len(last) == 2 and all(line["of"] == 2 and line["time"] > time.time() - 1 for line in last.values())

    def born(self, since: float) -> float:
        """Of a replica that is new, or of another's quorum without the one that has died."""
        lines = self.lines()
        lives = {self._life(line) for line in lines if line["time"] <= since}
        later = [line for line in lines if line["time"] > since]
        return min((line["time"] for line in later if line["of"] == 1 or self._life(line) not in lives), default=0.0)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    sys.exit(f"{what}: not within {DEADLINE_S:.0f} s")


def recovery(job: Job, fault: Callable[[], None], dice: random.Random) -> Recovery:
    """Wait for some steps, do something to a job, and wait for the first new step."""
    goal = (job.steps() or [(0.0, 0)])[-1][1] + SAVE_EVERY + dice.randint(2, SAVE_EVERY - 3)
    wait_for(lambda: job.steps() and job.steps()[-1][1] >= goal and job.whole(), f"step {goal}")
    step_s = statistics.median(job.step_times()[-30:])
    begun = time.time()
    fault()

    def back() -> list[tuple[float, int]]:
        """The steps since, up to the first that is new."""
        born = job.born(begun)
        lines = job.steps() if born else []
        best = max((step for when, step in lines if when < born), default=0)
        new = [line for line in lines if line[0] >= born and line[1] > best]
        return [line for line in lines if born <= line[0] <= new[0][0]] if new else []

    lines = wait_for(back, "a new step")
    at = (begun, *job.phases(begun), lines[-1][0])
    phases = tuple(later - earlier for earlier, later in itertools.pairwise(at)) if len(at) > 2 else ()
    return Recovery(lines[-1][0] - begun, len({step for _, step in lines}) - 1, step_s, phases)


@contextmanager
def running(kind: type[Job], nodes: int = 0, least: int = 2, most: int = 3) -> Iterator[Job]:
    with tempfile.TemporaryDirectory() as folder:
        if nodes:
            with Nodes(nodes) as cluster:
                job = kind(Path(folder), cluster, least, most)
                job.begin()
                yield job
        else:
            job = kind(Path(folder), None)
            job.begin()
            try:
                yield job
            finally:
                job.end()


def of_processes(kind: type[Job], fault: str, times: int, seed: int) -> Iterator[Recovery]:
    dice = random.Random(seed)
    with running(kind) as job:
        for _ in range(times):

            def strike() -> None:
                pids = job.pids()
                for rank in pids if fault == "ranks" else [dice.randrange(2)]:
                    os.kill(pids[rank], signal.SIGSTOP if fault == "hang" else signal.SIGKILL)

            yield recovery(job, strike, dice)


def of_nodes(kind: type[Job], fault: str, times: int, seed: int) -> Iterator[tuple[str, Recovery]]:
    """The same nodes die and come back in turn."""
    dice = random.Random(seed)
    most = 2 if fault == "spare" else 3
    with running(kind, 3, 2, most) as job:
        assert job.nodes is not None
        for _ in range(times):
            wait_for(lambda: len(job.steps()) > SAVE_EVERY, "the first steps")
            node = job.node_of(dice.randrange(1, 3) if fault == "node" else 0)
            yield fault, recovery(job, lambda node=node: job.nodes.kill(node), dice)  # type: ignore[misc]
            if fault == "spare":
                job.begin(node)
                time.sleep(5)  # until it waits as the next spare
            else:
                yield "back", recovery(job, lambda node=node: job.begin(node), dice)  # type: ignore[misc]


NAMES = {
    "rank": "one of two ranks killed",
    "ranks": "both ranks killed",
    "hang": f"a rank stopped, beyond {HANG_AFTER_S:.0f} s",
    "node": "a node of three lost",
    "first": "the first node lost",
    "back": "a node comes back",
    "spare": "a spare steps in",
}


JOBS: dict[str, type[Job]] = {"dtrain": Dtrain, "by hand": ByHand, "Fabric": Fabric, "torchft": Torchft}


def measure(o: Options) -> Iterator[tuple[str, str, Recovery]]:
    """Each recovery, with the fault and the job."""
    wanted = o.faults.split(",")
    for fault in wanted:
        for name in o.jobs.split(","):
            kind = JOBS[name]
            if fault in ("rank", "ranks") or (fault == "hang" and name == "dtrain"):
                for found in of_processes(kind, fault, o.times, o.seed):
                    yield fault, name, found
            elif fault in ("node", "first", "spare") and name in ("dtrain", "by hand"):
                for row, found in of_nodes(kind, fault, o.times, o.seed):
                    if row == fault or (fault == "node" and "back" in wanted):
                        yield row, name, found


def main(o: Options) -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; {o.times} of each, times in s")
    found: dict[tuple[str, str], list[Recovery]] = {}
    for fault, name, r in measure(o):
        found.setdefault((fault, name), []).append(r)
        print(f"  {NAMES[fault]:30} {name:8} {r.total_s:6.2f}, replayed {r.replayed}", file=sys.stderr, flush=True)
    print(f"{'':30} {'job':8} {'median':>7} {'worst':>7} {'replayed':>9} {'itself':>7}  median of {', '.join(PHASES)}")
    for (fault, name), taken in found.items():
        less = HANG_AFTER_S if fault == "hang" else 0.0
        totals = [r.total_s - less for r in taken]
        phases = [statistics.median(times) for times in zip(*(r.phases_s for r in taken), strict=True)]
        print(
            f"{NAMES[fault]:30} {name:8} {statistics.median(totals):7.2f} {max(totals):7.2f} "
            f"{statistics.median(r.replayed for r in taken):9.0f} "
            f"{statistics.median(r.itself_s for r in taken) - less:7.2f}  "
            f"{'  '.join(f'{seconds:.2f}' for seconds in phases)}"
        )
    for (fault, name), taken in found.items():
        if name != "dtrain" and (fault, "dtrain") in found:
            mine, other = (statistics.median(r.total_s for r in rs) for rs in (found[fault, "dtrain"], taken))
            print(f"{NAMES[fault]}: dtrain / {name} {mine / other:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options))
