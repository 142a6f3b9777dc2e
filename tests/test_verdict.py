"""What follows from failures: which step is passed over, and which ranks are called slow."""

from __future__ import annotations

from typing import Any

import dtrain
from dtrain.checkpoint.slots import Slots
from dtrain.elastic.failure import Failure
from dtrain.elastic.generation import Outcome
from dtrain.elastic.page import Page, Phase
from dtrain.elastic.verdict import Judge
from dtrain.training.slow import STEPS, Stragglers


class Case:
    """One supervisor's judge, and a trainer that fails where it is told to."""

    def __init__(self, **options: Any) -> None:
        self.page = Page.shared()
        config = dtrain.Config(dir="/nowhere", global_batch=2, micro_batch=1, skip_poison_batch=True, **options)
        self._judge = Judge(config, self.page, Slots().board)
        self._generation = 0

    def fail(self, at: int, done: int = 0, phase: Phase = Phase.FORWARD, asked: int = 0) -> Outcome:
        """:param at: the step that it fails in. :param done: the last one that it has finished."""
        self._judge.begin(self._generation)
        self._generation += 1
        self.page.at, self.page.micro_batch, self.page.step = at, 1, done
        self.page.mark(phase)
        outcome = self._judge.outcome(Failure(cause="planted"), 1, 0, asked, None)
        self._judge.learn(outcome)
        return outcome


def test_a_step_is_passed_over_when_all_failures_were_in_it() -> None:
    case = Case()
    case.fail(5, done=4)
    found = [case.fail(5, done=4) for _ in range(3)]
    assert [outcome.kind for outcome in found] == ["failed"] * 3
    assert found[-1].skipped == (5,)
    assert "planted (in micro-batch 1 of step 5), the last of 3 failures" in found[-1].cause


def test_failures_elsewhere_are_no_reason_to_pass_over_a_step() -> None:
    for places in (
        [(5, Phase.FORWARD), (0, Phase.RESTORE), (5, Phase.FORWARD)],
        [(5, Phase.FORWARD), (4, Phase.FORWARD), (4, Phase.FORWARD)],
        [(5, Phase.BODY)] * 3,
    ):
        case = Case()
        case.fail(5, done=4)
        assert [case.fail(at, done=min(at, 4), phase=phase).kind for at, phase in places][-1] == "stopped", places


def test_a_second_step_in_a_row_that_kills_ends_the_run() -> None:
    case = Case()
    case.fail(5, done=4)
    assert [case.fail(5, done=4) for _ in range(3)][-1].skipped == (5,)
    assert [case.fail(6, done=5).kind for _ in range(4)][-1] == "stopped"


def test_a_failure_while_all_are_asked_to_end_is_the_end() -> None:
    found = Case().fail(1, asked=15)
    assert (found.kind, found.signal) == ("ended", 15)


def test_only_ranks_with_as_many_micro_batches_are_compared() -> None:
    def named(shares: list[int], own_s: list[float]) -> list[int]:
        stragglers = Stragglers(shares)
        found: list[int] = []
        for _ in range(2 * STEPS):
            found += stragglers.stepped(own_s, 0.2)
        return found

    assert named([1, 2], [0.05, 0.1]) == [], "it has twice as much to do"
    assert named([2, 2], [0.05, 0.1]) == [1], "named once"
    assert named([1, 1, 2, 2], [0.05, 0.05, 0.1, 0.2]) == [3]
    assert named([1, 1], [0.01, 0.02]) == [], "a hundredth of a second is no fifth of a step"
