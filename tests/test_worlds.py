"""A run may go on with another number of ranks: it uses the samples in the same order, and comes to the same loss but
for rounding. And a trainer that is replaced is replaced by a fork, with which torchrun has nothing to do.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from tests import evidence, kills
from tests.conftest import STEPS, Undisturbed
from tests.jobs import start
from tests.train_job import Options

ROUNDING = 1e-4
"""Relative; what sums in another order come to after `STEPS` steps."""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(run=str(tmp_path / "run"), evidence=str(tmp_path / "evidence"), steps=STEPS)


def assert_same_but_for_rounding(options: Options, undisturbed: evidence.Evidence) -> None:
    found = evidence.of_run(options)
    evidence.assert_each_once_an_epoch(found)
    assert found.ids == undisturbed.ids
    assert found.losses[-1] == pytest.approx(undisturbed.losses[-1], rel=ROUNDING)
    evidence.assert_nothing_left(options)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_what_two_ranks_saved_others_continue_with_the_same_samples(
    options: Options, undisturbed: Undisturbed, ranks: int
) -> None:
    with start(dataclasses.replace(options, steps=23, step_s=0.0), 2) as job:
        assert job.wait() == 0, job.tail()
    before = evidence.counted_ids(Path(options.evidence), 23)
    assert before == undisturbed(2).ids[:23]
    with start(dataclasses.replace(options, step_s=0.0), ranks) as job:
        assert job.wait() == 0, job.tail()
    assert_same_but_for_rounding(options, undisturbed(2))


def test_a_group_killed_at_three_ranks_goes_on_with_two(options: Options, undisturbed: Undisturbed) -> None:
    dice = random.Random(21)
    with start(options, 3) as job:
        kills.trainers(job, dice)
        job.until_new_steps(6)
        job.kill_all()
    with start(options, 2) as job:
        kills.trainers(job, dice)
        assert job.wait() == 0, job.tail()
    assert_same_but_for_rounding(options, undisturbed(2))


def test_a_lone_process_without_torchrun_is_supervised_as_well(options: Options, undisturbed: Undisturbed) -> None:
    dice = random.Random(22)
    with start(options, 0) as job:
        kills.trainers(job, dice)
        kills.in_a_save(job, dice, 0)
        kills.after_the_fork(job, dice, 0)
        assert set(job.supervisors().values()) == {job.agent}, "it is the process that was started"
        assert job.wait() == 0, job.tail()
    evidence.assert_same(evidence.of_run(options), undisturbed(1))
    evidence.assert_nothing_left(options)


def test_a_lone_process_that_is_killed_takes_its_trainer_with_it(options: Options, undisturbed: Undisturbed) -> None:
    dice = random.Random(23)
    with start(options, 0) as job:
        kills.the_agent(job, dice)
    with start(options, 0) as job:
        assert job.wait() == 0, job.tail()
    evidence.assert_same(evidence.of_run(options), undisturbed(1))


def test_a_trainer_is_replaced_by_a_fork_and_torchrun_takes_no_part(options: Options) -> None:
    dice = random.Random(24)
    with start(options, 2) as job:
        job.until_new_steps()
        supervisors, trainers = job.supervisors(), job.trainers()
        kills.trainers(job, dice, rank=1)
        job.until_new_steps()
        assert job.supervisors() == supervisors
        assert not set(job.trainers().values()) & set(trainers.values()), "every rank got a new trainer"
        assert job.wait() == 0, job.tail()
    assert {life["supervisor"] for life in job.lives()} == set(supervisors.values())
    assert "torch/distributed/elastic" not in job.tail(), "torchrun noticed something"
