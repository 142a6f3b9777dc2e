"""Whatever is killed, and whenever: the run goes on by itself or where it's started again, and ends with the bits of
the run that nothing happened to.

Each test compares the weights, the optimizer's state, every step's loss and every sample that was used with those of
the undisturbed run, and looks for processes and files that were left behind.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import evidence, kills
from tests.campaign import STEPS_A_KILL, run_once
from tests.conftest import STEPS, Undisturbed
from tests.evidence import assert_ended_as
from tests.jobs import read_lines, start
from tests.places import Place
from tests.train_job import Options


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(run=str(tmp_path / "run"), evidence=str(tmp_path / "evidence"), steps=STEPS)


@pytest.mark.parametrize(("ranks", "seed"), [(3, 2)])
def test_a_killed_rank_changes_no_bit(options: Options, undisturbed: Undisturbed, ranks: int, seed: int) -> None:
    dice = random.Random(seed)
    with start(options, ranks) as job:
        for count in (1, 1, 2, 1, ranks):  # so many at once
            kills.trainers(job, dice, count)
        assert_ended_as(job, undisturbed, ranks)


@pytest.mark.parametrize(("ranks", "seed"), [(3, 6)])
def test_ranks_killed_in_the_middle_of_a_save_change_no_bit(
    options: Options, undisturbed: Undisturbed, ranks: int, seed: int
) -> None:
    dice = random.Random(seed)
    with start(options, ranks) as job:
        kills.in_a_save(job, dice, 0)
        kills.in_a_save(job, dice, ranks - 1)
        kills.in_a_save(job, dice, *range(ranks))
        assert_ended_as(job, undisturbed, ranks)


@pytest.mark.parametrize(("ranks", "seed"), [(3, 15)])
def test_killed_savers_are_replaced_and_change_no_bit(
    options: Options, undisturbed: Undisturbed, ranks: int, seed: int
) -> None:
    """What was being saved is not: that ends the generation, and the next one goes on from memory."""
    dice = random.Random(seed)
    with start(options, ranks) as job:
        kills.a_saver(job, dice, ranks - 1)
        kills.in_a_save(job, dice, 0, savers=True)
        kills.in_a_save(job, dice, ranks - 1, savers=True)
        assert_ended_as(job, undisturbed, ranks)


@pytest.mark.parametrize(("ranks", "seed"), [(3, 8)])
def test_ranks_killed_before_their_first_step_change_no_bit(
    options: Options, undisturbed: Undisturbed, ranks: int, seed: int
) -> None:
    dice = random.Random(seed)
    with start(options, ranks) as job:
        kills.before_its_first_step(job, dice, 1)
        kills.after_the_fork(job, dice, 0)
        kills.after_the_fork(job, dice, ranks - 1)
        kills.before_its_first_step(job, dice, 0)
        assert_ended_as(job, undisturbed, ranks)


def test_a_rank_that_raises_an_error_is_started_again_and_changes_no_bit(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    options = Options(
        run=str(tmp_path / "run"), evidence=str(tmp_path / "evidence"), steps=STEPS, raise_at=13, raise_rank=1
    )
    with start(options, 3) as job:
        assert_ended_as(job, undisturbed, 3)
        assert "rank 1 failed after step 12: RuntimeError: an error in the user's own code" in job.tail()
        assert job.tail().count("Traceback") == 1, "the other ranks' errors are its outcome, and not worth a word"


@pytest.mark.parametrize(("ranks", "seed", "killed"), [(2, 9, (0,)), (3, 10, (2, 0))])
def test_a_killed_supervisor_changes_no_bit(
    options: Options, undisturbed: Undisturbed, ranks: int, seed: int, killed: tuple[int, ...]
) -> None:
    dice = random.Random(seed)
    with start(options, ranks, restarts=len(killed)) as job:
        for rank in killed:
            kills.a_supervisor(job, dice, rank)
        assert_ended_as(job, undisturbed, ranks)


def test_a_killed_watcher_changes_no_bit(options: Options, undisturbed: Undisturbed) -> None:
    dice = random.Random(11)
    with start(options, 3, restarts=1) as job:
        kills.a_watcher(job, dice, 2)
        assert_ended_as(job, undisturbed, 3)


def test_all_ends_with_a_killed_agent_and_goes_on_when_it_is_started_again(
    options: Options, undisturbed: Undisturbed
) -> None:
    dice = random.Random(12)
    with start(options, 3) as job:
        kills.trainers(job, dice)
        kills.the_agent(job, dice)
    with start(options, 3) as job:
        kills.trainers(job, dice)
        assert_ended_as(job, undisturbed, 3)


def test_everything_killed_in_the_middle_of_a_save_goes_on_from_the_save_before(
    options: Options, undisturbed: Undisturbed
) -> None:
    dice = random.Random(13)
    run = Place(options.run)
    with start(options, 3) as job:
        job.until("commit", lambda: evidence.committed(run))
        kills.everything_in_a_save(job, dice)
    saved = max(int(attempt.split(".")[0].removeprefix("step-")) for attempt in evidence.committed(run))
    with start(options, 3) as job:
        assert_ended_as(job, undisturbed, 3)
    trace = read_lines(Path(options.evidence) / "trace-0.jsonl")
    assert min(line["step"] for line in trace if line["pid"] in job.born_here()) == saved + 1


def test_thirty_kills_of_whatever_there_is_change_no_bit(tmp_path: Path) -> None:
    """On two ranks, as most tests here have three. Two hundred of them:
    `python -m tests.campaign --seed 1 --ranks 2 --kills 200`.
    """

    def options(name: str, step_s: float) -> Options:
        run, seen = str(tmp_path / name / "run"), str(tmp_path / name / "evidence")
        return Options(run=run, evidence=seen, steps=STEPS_A_KILL * 31, step_s=step_s)

    undisturbed, killed = options("undisturbed", 0.0), options("killed", 0.02)
    run_once(undisturbed, 2, random.Random(0), 0)
    done = run_once(killed, 2, random.Random(30), 30)
    assert len(done) == 30
    evidence.assert_same(evidence.of_run(killed), evidence.of_run(undisturbed))
    evidence.assert_nothing_left(killed)
