"""A job on several nodes, seen from outside: each runs `launch/node.sh`, as a node of a cluster does.

They are network namespaces where this machine lets us make them, else processes on 127.0.0.1, where nothing can be cut
off.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.cli.nodes import Nodes
from tests.evidence import assert_nothing_left, of_run
from tests.jobs import ROOT, Hang, last_step, read_lines, start
from tests.train_job import Options

STEPS = 130
PATIENCE_S = 90.0
SLOW_STEP_S = 1.0
"""Where other tests run beside it."""


class Cluster:
    """A job of one process a node, under torchrun, each with its agent."""

    def __init__(self, nodes: Nodes, options: Options, least: int, most: int) -> None:
        self.nodes = nodes
        self.options = options
        self._limits = f"{least}:{most}"
        self._folder = Path(options.evidence)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._output = (self._folder / "output.txt").open("ab")

    def begin(self, *numbers: int) -> None:
        for node in numbers:
            command = ["bash", str(ROOT / "launch" / "node.sh"), "-m", "tests.train_job", self.options.to_json()]
            environment = {
                "STORE": self.nodes.store,
                "NODES": self._limits,
                "ADDRESS": self.nodes.address(node),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(self._folder),
            }
            self.nodes.start(node, command, environment, self._output)

    def events(self, kind: str) -> list[dict[str, object]]:
        return [line for line in read_lines(Path(self.options.run) / "events.jsonl") if line["event"] == kind]

    def hosts(self) -> dict[int, str]:
        """Who trains as which rank, in the newest group."""
        started = self.events("started")
        newest = [event for event in started if event["epoch"] == started[-1]["epoch"]]
        return {int(str(event["rank"])): str(event["host"]) for event in newest}

    def step(self) -> int:
        return max((last_step(path) for path in self._folder.glob("trace-*.jsonl")), default=0)

    def until(self, what: str, condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Hang(f"no {what} within {seconds:.0f} s, at step {self.step()}\n{self.said()[-6000:]}")
            time.sleep(0.02)

    def until_it_trains_on(self, ranks: int) -> None:
        """Wait for a group of so many ranks that has begun after this call, and for steps of it."""
        known = len(self.events("started"))
        self.until(
            f"group of {ranks} ranks", lambda: [e for e in self.events("started")[known:] if e["world_size"] == ranks]
        )
        self.until_new_steps()

    def until_new_steps(self, count: int = 5) -> None:
        goal = self.step() + count
        self.until(f"step {goal}", lambda: self.step() >= goal)

    def node_of(self, rank: int) -> int:
        return int(self.hosts()[rank].removeprefix("node")) if self.nodes.apart else rank

    def said(self) -> str:
        return (self._folder / "output.txt").read_text(errors="replace")

    def close(self) -> None:
        self._output.close()


@contextmanager
def cluster(
    folder: Path, *, least: int, most: int, count: int = 3, steps: int = STEPS, **more: Any
) -> Iterator[Cluster]:
    """:param more: see `Options`."""
    run, seen = str(folder / "run"), str(folder / "evidence")
    options = Options(run=run, evidence=seen, steps=steps, step_s=0.15, reduction="exact", **more)
    with Nodes(count) as nodes:
        job = Cluster(nodes, options, least, most)
        try:
            job.begin(*range(count))
            job.until_new_steps()
            yield job
        finally:
            job.close()
    assert not list(Path("/run/netns").glob(f"{nodes._token}-*")), "a namespace was left behind"


def disturb(job: Cluster, what: str, rank: int) -> None:
    """Do something to the node of a rank, wait until the others go on without it, and until it takes part again.

    :param what: kill, cut or freeze.
    """
    node, nodes = job.node_of(rank), job.nodes
    getattr(nodes, what)(node)
    job.until_it_trains_on(2)
    bring_back: dict[str, Callable[[int], None]] = {"kill": job.begin, "cut": nodes.heal, "freeze": nodes.thaw}
    bring_back[what](node)
    job.until_it_trains_on(3)


def undisturbed_in(folder: Path, steps: int) -> dict[str, str]:
    """What one process ends with, that is left in peace."""
    evidence = str(folder / "evidence")
    options = Options(run=str(folder / "run"), evidence=evidence, steps=steps, step_s=0, reduction="exact")
    with start(options, 1) as job:
        assert job.wait(PATIENCE_S + SLOW_STEP_S * steps) == 0, job.tail()
    return of_run(options).digests[0]


def assert_ended_as(job: Cluster, undisturbed: dict[str, str]) -> None:
    seconds = PATIENCE_S + SLOW_STEP_S * job.options.steps
    job.until("end", lambda: not any(map(job.nodes.is_running, range(job.nodes.count))), seconds)
    assert job.nodes.worst() == 0, job.said()[-6000:]
    results = [json.loads(path.read_text()) for path in Path(job.options.evidence).glob("result-*.json")]
    assert results
    for part in ("parameters", "optimizer", "schedule"):  # batch norm's statistics are those of a rank's own samples
        assert {result[part] for result in results} == {undisturbed[part]}, part
    assert_nothing_left(job.options)
