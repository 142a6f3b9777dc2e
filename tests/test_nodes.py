"""Nodes that die, are cut off, stall and come back: the run goes on with what is there, and ends with the same bits.

They are network namespaces where this machine lets us make them, else processes on 127.0.0.1, where nothing can be cut
off; what was used is in the report of `pytest -rs`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.cli.nodes import Nodes, agent
from tests.evidence import assert_nothing_left, of_run
from tests.jobs import ROOT, Hang, last_step, read_lines, start
from tests.train_job import Options

STEPS = 150
PATIENCE_S = 90.0


class Cluster:
    """A job of one process a node, under torchrun, each with its agent."""

    def __init__(self, nodes: Nodes, options: Options, least: int, most: int) -> None:
        self.nodes = nodes
        self.options = options
        self._limits = {"least": least, "most": most}
        self._folder = Path(options.evidence)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._output = (self._folder / "output.txt").open("ab")

    def begin(self, *numbers: int) -> None:
        for node in numbers:
            command = agent(self.nodes, node, ["-m", "tests.train_job", self.options.to_json()], **self._limits)
            self.nodes.start(node, command, {"PYTHONPATH": str(ROOT), "TMPDIR": str(self._folder)}, self._output)

    def events(self, kind: str) -> list[dict[str, object]]:
        return [line for line in read_lines(Path(self.options.run) / "events.jsonl") if line["event"] == kind]

    def hosts(self) -> dict[int, str]:
        """Who trains as which rank, in the newest group."""
        started = self.events("started")
        newest = [event for event in started if event["epoch"] == started[-1]["epoch"]]
        return {int(str(event["rank"])): str(event["host"]) for event in newest}

    def step(self) -> int:
        return max((last_step(path) for path in self._folder.glob("trace-*.jsonl")), default=0)

    def until(self, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise Hang(f"no {what} within {PATIENCE_S:.0f} s, at step {self.step()}\n{self.said()[-6000:]}")
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
def cluster(folder: Path, *, least: int, most: int, count: int = 3) -> Iterator[Cluster]:
    options = Options(
        run=str(folder / "run"),
        evidence=str(folder / "evidence"),
        steps=STEPS,
        save_every=5,
        step_s=0.15,
        reduction="exact",
    )
    with Nodes(count) as nodes:
        job = Cluster(nodes, options, least, most)
        try:
            job.begin(*range(count))
            job.until_new_steps()
            yield job
        finally:
            job.close()
    assert not list(Path("/run/netns").glob(f"{nodes._token}-*")), "a namespace was left behind"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process ends with, that is left in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    evidence = str(folder / "evidence")
    options = Options(run=str(folder / "run"), evidence=evidence, steps=STEPS, step_s=0, reduction="exact")
    with start(options, 1) as job:
        assert job.wait() == 0, job.tail()
    return of_run(options).digests[0]


def assert_ended_as(job: Cluster, undisturbed: dict[str, str]) -> None:
    job.until("end", lambda: not any(map(job.nodes.is_running, range(job.nodes.count))))
    assert job.nodes.worst() == 0, job.said()[-6000:]
    results = [json.loads(path.read_text()) for path in Path(job.options.evidence).glob("result-*.json")]
    assert results
    for part in ("parameters", "optimizer", "schedule"):  # batch norm's statistics are those of a rank's own samples
        assert {result[part] for result in results} == {undisturbed[part]}, part
    assert_nothing_left(job.options)


def test_nodes_that_die_or_are_cut_off_or_stall_are_left_behind_and_taken_in_again(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    """The first node dies; another is cut off, with its processes alive; and the first of then stalls for a while."""
    with cluster(tmp_path, least=2, most=3) as job:
        nodes = job.nodes
        for what, rank in (("kill", 0), ("cut", 2), ("freeze", 0)):
            if what == "cut" and not nodes.apart:
                continue
            node = job.node_of(rank)
            getattr(nodes, what)(node)
            job.until_it_trains_on(2)
            bring_back: dict[str, Callable[[int], None]]
            bring_back = {"kill": job.begin, "cut": nodes.heal, "freeze": nodes.thaw}
            bring_back[what](node)
            job.until_it_trains_on(3)
        assert "has not been heard of for 3 s: torchrun is to form the group anew" in job.said()
        assert_ended_as(job, undisturbed)


def test_a_spare_steps_in_for_a_node_that_dies(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    with cluster(tmp_path, least=2, most=2) as job:
        before = set(job.hosts().values())
        job.nodes.kill(job.node_of(0))
        job.until_it_trains_on(2)
        assert len(set(job.hosts().values()) - before) == 1 or not job.nodes.apart
        assert_ended_as(job, undisturbed)
