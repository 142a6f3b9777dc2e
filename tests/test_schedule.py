"""When a checkpoint or a snapshot is due, and which ones are kept."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from dtrain.checkpoint import schedule
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.policy import Keep, best_of, to_retire
from dtrain.checkpoint.schedule import Action, Schedule
from dtrain.config import Config, Interval
from dtrain.criteria import Best
from dtrain.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(schedule, "time", clock)
    return clock


def made(save_every: int | str, snapshot_every: int | str = "auto", **options: Any) -> Schedule:
    options = {"mtbf_s": 86_400.0} | options
    return Schedule(Interval.parse(save_every), Interval.parse(snapshot_every), lambda step: step // 7, **options)


def walk(
    plan: Schedule, clock: Clock, steps: int, *, step_s: float, stall_s: float = 0.0, save_steps: int = 0
) -> dict[Action, list[int]]:
    """What was due after which step, of steps that take so long; a save is under way for `save_steps` of them."""
    done: dict[Action, list[int]] = {action: [] for action in Action}
    until = 0
    for step in range(1, steps + 1):
        action = plan.due(step, busy=step <= until)
        clock.now += step_s
        plan.stepped(step_s, saving=step <= until)
        if action is Action.SAVE:
            until = step + save_steps
            plan.saved()
        if action is not Action.NOTHING:
            clock.now += stall_s
            plan.snapped(step, stall_s)
        done[action].append(step)
    return done


@pytest.mark.parametrize(("every", "saves"), [(4, [4, 8, 12]), ("1 epoch", [7, 14]), ("3s", [4, 8, 12])])
def test_a_checkpoint_is_due_by_steps_epochs_or_seconds(clock: Clock, every: int | str, saves: list[int]) -> None:
    assert walk(made(every, 1), clock, 15, step_s=1.0)[Action.SAVE][: len(saves)] == saves


def test_automatic_snapshots_take_one_hundredth_of_the_time(clock: Clock) -> None:
    for stall_s, distance in ((0.0005, 1), (0.002, 2), (0.05, 50)):
        plan = made(10_000)
        found = walk(plan, clock, 500, step_s=0.1, stall_s=stall_s)[Action.SNAPSHOT]
        assert plan.snapshot_every_steps == distance
        later = [b - a for a, b in pairwise(found[1:])]
        assert set(later) == {distance}


def test_automatic_checkpoints_are_as_far_apart_as_daly_says(clock: Clock) -> None:
    """For a cost of 20 s and a failure a day, by hand: sqrt(2 * 20 * 86400) * (1 + sqrt(x) / 3 + x / 9) - 20."""
    plan = made("auto", 10_000)
    for saving in (False,) * 20 + (True,) * 10 + (False,):
        if saving and plan._extra_s is None:
            plan.saved()
        plan.stepped(12.0 if saving else 10.0, saving=saving)  # ten steps that take two seconds more
    x = 20 / (2 * 86_400)
    assert plan.save_every_s == pytest.approx(math.sqrt(2 * 20 * 86_400) * (1 + math.sqrt(x) / 3 + x / 9) - 20)
    assert plan.save_every_s == pytest.approx(1846, abs=1)
    assert made("auto", mtbf_s=0.4).save_every_s == 0.4, "where a save costs more than the time between two failures"


def test_an_early_checkpoint_waits_or_is_skipped_and_counted(clock: Clock) -> None:
    waits = made(2, 1000)
    assert walk(waits, clock, 12, step_s=1.0, save_steps=3)[Action.SAVE] == [2, 4, 6, 8, 10, 12]
    assert waits.skipped == 0
    skips = made(2, 1000, early="skip")
    assert walk(skips, clock, 12, step_s=1.0, save_steps=3)[Action.SAVE] == [2, 6, 10]
    assert skips.skipped == 3
    by_clock = made("2s", 1000)
    found = walk(by_clock, clock, 12, step_s=1.0, save_steps=3)[Action.SAVE]
    assert [b - a for a, b in pairwise(found)] == [4, 4], "as soon as the one before is written"
    assert by_clock.skipped == 0


def log_of(*steps: int, metrics: dict[int, float] | None = None, age_s: float = 10.0) -> Log:
    log = Log(None)  # type: ignore[arg-type]  # nothing is read
    for number, step in enumerate(steps):
        measured = {"val/loss": metrics[step]} if metrics and step in metrics else {}
        when = -age_s * (len(steps) - 1 - number)
        log.entries.append(
            Entry(kind="commit", epoch=1, time=when, step=step, attempt=str(step), metrics=measured, number=number)
        )
    return log


def kept(log: Log, keep: Keep) -> list[int]:
    gone = {entry.attempt for entry in to_retire(log, keep, now=0.0)}
    return [entry.step for entry in log.entries if entry.attempt not in gone]


def test_what_is_kept_is_what_any_rule_keeps() -> None:
    steps = [3, 6, 9, 12, 15, 18, 21]
    assert kept(log_of(*steps), Keep(last=3)) == [15, 18, 21]
    assert kept(log_of(*steps), Keep(last=2, every=10)) == [12, 18, 21]
    assert kept(log_of(*steps), Keep(last=2, younger_s=35)) == [12, 15, 18, 21]
    best = Best("val/loss", k=2)
    losses = {3: 0.5, 6: 0.2, 9: math.nan, 12: 0.2, 15: 0.9}
    assert kept(log_of(*steps, metrics=losses), Keep(last=2, best=best)) == [6, 12, 18, 21]
    assert kept(log_of(*steps, metrics=losses), Keep(last=2, every=9, best=best)) == [6, 9, 12, 18, 21]


def test_two_are_kept_whatever_the_rules_say() -> None:
    assert kept(log_of(1, 2, 3), Keep(last=0, younger_s=0.0)) == [2, 3]
    assert kept(log_of(1), Keep(last=2)) == [1]
    assert kept(log_of(), Keep(last=2)) == []


def test_the_best_is_the_oldest_of_equals_and_never_a_nan() -> None:
    log = log_of(1, 2, 3, 4, metrics={1: math.nan, 2: 0.7, 3: 0.7, 4: 0.1})
    assert [entry.step for entry in best_of(log.entries, Best("val/loss", "max", 3))] == [2, 3, 4]
    assert [entry.step for entry in best_of(log.entries, Best("val/loss", "min", 1))] == [4]
    assert best_of(log.entries, Best("other")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshot_every": "1 epoch"}, "snapshot_every='1 epoch' takes steps, a time or 'auto'"),
        ({"snapshot_every": "often"}, "snapshot_every='often' is no interval"),
        ({"early_save": "drop"}, "early_save='drop' must be 'wait' or 'skip'"),
        ({"mtbf_hours": 0}, "mtbf_hours=0 must be a number above zero"),
        ({"mtbf_hours": "24"}, "mtbf_hours='24' must be a number above zero"),
        ({"timeout_s": None}, "timeout_s=None must be a number above zero"),
        ({"keep_best": "val/loss"}, "keep_best='val/loss' must be a Best, such as dtrain.Best('val/loss', k=3)"),
        ({"keep_every": True}, "keep_every=True must be a number of steps, 1 or more"),
        ({"keep_every": 0}, "keep_every=0 must be a number of steps, 1 or more"),
        ({"keep_for": "3 steps"}, "keep_for='3 steps' must be a time, such as '2h'"),
    ],
)
def test_options_that_can_not_be_right_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        Config(dir="x", global_batch=8, micro_batch=4, **options)
    assert message in str(found.value)
