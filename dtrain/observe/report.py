"""What a run went through, read off its events and metrics.

    history("runs/gpt").failures        who failed, why, and what it cost
    losses("runs/gpt")                  the loss of every step

Both may be called while the run is still going on: what has not happened yet is None.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.observe.events import EVENTS, METRICS, read_lines

_GROWS = 5
"""Measurements in a row."""
_PART = 0.1


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One rank's process, in one generation."""

    time: float
    """When it had joined the others, as Unix time in seconds, like all times here."""
    rank: int
    pid: int
    world_size: int
    epoch: int
    """Of its group in the commit log: it rises with every start of the supervisors."""
    generation: int
    """Of this life of the group's trainers, beginning at 0."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A checkpoint that was whole and durable at `time`."""

    time: float
    step: int
    seconds: float
    """How long it took to write."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of a generation, and the way back from it."""

    time: float
    """When it was noticed."""
    rank: int
    """The rank that failed first."""
    cause: str
    """One line, such as `killed by SIGKILL`."""
    step: int
    """The last step that this rank had finished."""
    restored: int | None = None
    """The step that the next generation started from; 0 where there was no checkpoint yet."""
    restored_at: float | None = None
    """When that one's state was loaded on all ranks; None too where there was nothing to load."""
    caught_up: int | None = None
    """The first step that was new: none before the failure had been as far."""
    caught_up_at: float | None = None
    """When that step was finished."""

    @property
    def lost_steps(self) -> int | None:
        """Steps that had been done and were done again."""
        return None if self.restored is None else max(0, self.step - self.restored)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A step that takes no part in the training."""

    time: float
    step: int
    reason: str
    """Empty where it is told by the failures before it."""
    rolled_back: bool
    """Whether the run went back to a state before it, and came to it again to pass it over."""
    samples: dict[str, list[int]]
    """Their ids, by the name of the data."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The events of a run, in the order in which they happened."""

    trainers: list[Trainer] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def alive(self, rank: int) -> Trainer | None:
        """A rank's newest trainer, unless a failure has ended it since, or its generation is still gathering."""
        newest = max(((trainer.epoch, trainer.generation) for trainer in self.trainers), default=(0, 0))
        group = [trainer for trainer in self.trainers if (trainer.epoch, trainer.generation) == newest]
        if not group or len(group) < group[0].world_size:
            return None
        if self.failures and self.failures[-1].time > max(trainer.time for trainer in group):
            return None
        return next((trainer for trainer in group if trainer.rank == rank), None)


def history(run: str | Path) -> History:
    """Read a run folder's events. An empty history if it has none yet."""
    found = History()
    for line in read_lines(Path(run) / EVENTS):
        try:
            _add(found, line)
        except (KeyError, TypeError):  # a line of another version: it says something that isn't asked here
            continue
    return found


def losses(run: str | Path) -> dict[int, float]:
    """The loss of every step that was written down, by step; of one that was done again, the last."""
    found: dict[int, float] = {}
    for line in read_lines(Path(run) / METRICS):
        if isinstance(line.get("step"), int) and isinstance(line.get("loss"), int | float):
            found[line["step"]] = float(line["loss"])
    return dict(sorted(found.items()))


def growing_gap(run: str | Path) -> str:
    """What there is to say about the gap between the loss that is trained on and that of held-out data.

    Between two measurements, the training's loss is the mean over its steps. The gap is said to keep growing when it
    grew in each of the last five measurements, and by a tenth of the held-out loss in all.

    :returns: a sentence; empty if it doesn't, or if no held-out loss was measured.
    """
    lines: dict[int, dict[str, Any]] = {}
    for line in read_lines(Path(run) / METRICS):
        if isinstance(line.get("step"), int):
            lines[line["step"]] = line
    gaps: list[tuple[int, float, float]] = []
    name, losses = "", []
    for step, line in sorted(lines.items()):
        if isinstance(line.get("loss"), int | float):
            losses.append(float(line["loss"]))
        name = name or next((key for key in line if key.endswith("/loss")), "")
        if losses and name and isinstance(line.get(name), int | float):
            gaps.append((step, line[name] - sum(losses) / len(losses), line[name]))
            losses = []
    last = gaps[-1 - _GROWS :]
    grows = all(later[1] > earlier[1] for earlier, later in itertools.pairwise(last))
    if len(last) <= _GROWS or not grows or last[-1][1] - last[0][1] < _PART * abs(last[-1][2]):
        return ""
    return (
        f"since step {last[0][0]} the gap between {name} and the loss that is trained on keeps growing, from "
        f"{last[0][1]:.3g} to {last[-1][1]:.3g}: the model learns its samples by heart; stop earlier "
        "(Config(early_stop=...)), regularize more, or add data"
    )


def _add(found: History, line: dict[str, Any]) -> None:
    """Add one event; what brings the run back is added to the failures that it is still coming back from."""
    time = float(line["time"])
    match line["event"]:
        case "started":
            found.trainers.append(
                Trainer(
                    time=time,
                    rank=line["rank"],
                    pid=line["pid"],
                    world_size=line["world_size"],
                    epoch=line["epoch"],
                    generation=line["generation"],
                )
            )
        case "committed":
            found.commits.append(
                Commit(time=time, step=line["step"], seconds=line["seconds"], bytes=line["bytes"]),
            )
        case "failed":
            found.failures.append(Failure(time=time, rank=line["rank"], cause=line["cause"], step=line["step"]))
        case "restored":
            for index, failure in enumerate(found.failures):
                if failure.restored is None:
                    found.failures[index] = replace(failure, restored=line["step"], restored_at=time)
        case "caught_up":
            for index, failure in enumerate(found.failures):
                if failure.caught_up is None:
                    restored = 0 if failure.restored is None else failure.restored
                    found.failures[index] = replace(
                        failure, restored=restored, caught_up=line["step"], caught_up_at=time
                    )
        case "skipped" | "rolled_back" as kind:
            back = kind == "rolled_back"
            if back or not any(one.step == line["step"] and one.rolled_back for one in found.left_out):
                found.left_out.append(
                    LeftOut(
                        time=time,
                        step=line["step"],
                        reason=line.get("reason", ""),
                        rolled_back=back,
                        samples=line["samples"],
                    )
                )
        case "warning":
            found.warnings.append(str(line["message"]))
