"""What a job has left behind, and whether it's what the undisturbed job left.

A step that was done again counts once: by the trace of the last life that came to it, since what the lives before had
computed of it is lost with them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs import Job, read_lines
from tests.places import Place
from tests.train_job import GLOBAL_BATCH, SAMPLES, Options

_SHARED = {"config.json", "log", "checkpoints"}
_LOCAL = {"events.jsonl", "metrics.jsonl"}


@dataclass(frozen=True)
class Evidence:
    """All that two runs are compared by."""

    digests: dict[int, dict[str, str]]
    """By rank: SHA-256 of the parameters, of the weights with their buffers, of the optimizer's state, and of the
    schedule's."""
    ids: list[list[int]]
    """The samples of each step, in the order of the list of micro-batches."""
    losses: list[float]
    """The mean loss of each step."""


def of_run(options: Options) -> Evidence:
    """The evidence of a run that has come to its end."""
    folder = Path(options.evidence)
    digests = {int(path.stem[7:]): json.loads(path.read_text()) for path in folder.glob("result-*.json")}
    losses = {
        line["step"]: float(line["loss"]) for line in read_lines(Path(options.local or options.run) / "metrics.jsonl")
    }
    return Evidence(digests, counted_ids(folder, options.steps), [losses[n] for n in range(1, options.steps + 1)])


def counted_ids(folder: Path, steps: int) -> list[list[int]]:
    """The samples of the steps that count."""
    last: dict[int, int] = defaultdict(int)
    traces = [list(read_lines(folder / f"trace-{rank}.jsonl")) for rank in range(len(list(folder.glob("trace-*"))))]
    for trace in traces:
        for line in trace:
            last[line["step"]] = max(last[line["step"]], line["life"])
    ids: list[list[int]] = [[] for _ in range(steps)]
    for trace in traces:  # rank after rank, each with a block of the list
        for line in trace:
            if line["life"] == last[line["step"]]:
                ids[line["step"] - 1] += line["ids"]
    return ids


def assert_same(found: Evidence, undisturbed: Evidence) -> None:
    """The same samples in the same order, the same losses, and the same bits on every rank."""
    assert found.ids == undisturbed.ids
    for step, (mine, theirs) in enumerate(zip(found.losses, undisturbed.losses, strict=True), start=1):
        assert mine == theirs, f"the loss of step {step} is the first to differ"
    assert found.digests == undisturbed.digests


def assert_ended_as(job: Job, undisturbed: Callable[[int], Evidence], ranks: int) -> None:
    """Wait for the end of a job; nothing may tell it from the undisturbed one on so many ranks."""
    assert job.wait() == 0, job.tail()
    assert_same(of_run(job.options), undisturbed(ranks))
    assert_nothing_left(job.options)


def assert_each_once_an_epoch(found: Evidence) -> None:
    """Every epoch that the run came through has every sample once."""
    assert all(len(ids) == GLOBAL_BATCH for ids in found.ids)
    sequence = [sample for ids in found.ids for sample in ids]
    for start in range(0, len(sequence) - SAMPLES + 1, SAMPLES):
        assert sorted(sequence[start : start + SAMPLES]) == list(range(SAMPLES)), f"epoch at position {start}"


def assert_nothing_left(options: Options) -> None:
    """The run folder holds the checkpoints that are committed and kept, and nothing half-made."""
    run = Place(options.run)
    # What a kill has left half-made stays for ten minutes, in case its writer is alive somewhere else.
    assert {name for name in run.names() if not name.endswith(".half")} == _SHARED | (
        set() if options.local else _LOCAL
    )
    if options.local:
        assert {path.name for path in Path(options.local).iterdir()} == _LOCAL
    log = [name for name in run.names("log") if not name.endswith(".half")]
    assert log == [f"{number:08d}.json" for number in range(len(log))]
    assert set(run.names("checkpoints")) == committed(run)


def committed(run: Place) -> set[str]:
    """The folders of the commits that weren't retired, read from the log's files themselves."""
    found: set[str] = set()
    for entry in _log(run):
        if entry["kind"] == "commit":
            found.add(entry["attempt"])
        elif entry["kind"] == "retire":
            found.discard(entry["attempt"])
    return found


def attempt_under_way(run: Place) -> str:
    """An attempt at a checkpoint that isn't committed yet; "" if there is none."""
    written = set(run.names("checkpoints"))
    # Retired ones are in the log as well, but lie there no longer than it takes to delete them.
    return max(written - {entry["attempt"] for entry in _log(run)}, default="")


def _log(run: Place) -> list[dict[str, Any]]:
    names = [name for name in run.names("log") if name[0].isdigit()]
    return [json.loads(run.read(f"log/{name}"))["entry"] for name in names]
