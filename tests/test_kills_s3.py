"""The same kills with the run in a bucket of a real S3 server, which is killed as well.

What the tests of `test_kills` show of a disk: see there.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import evidence, kills
from tests.conftest import STEPS, Undisturbed
from tests.evidence import assert_ended_as
from tests.fault_proxy import Proxy
from tests.jobs import Job, start
from tests.places import Place
from tests.s3_server import BUCKET, Server
from tests.train_job import Options


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the job and its bucket, to stop a save at a moment that is known."""
    with Proxy(s3.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def options(tmp_path: Path, proxy: Proxy) -> Options:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}/run"
    return Options(run=url, local=str(tmp_path / "local"), evidence=str(tmp_path / "evidence"), steps=STEPS)


def in_a_save(job: Job, proxy: Proxy, *ranks: int, savers: bool = False) -> None:
    """Kill trainers, or savers, when all shards are in the bucket and the manifest is on its way there. It arrives."""
    job.until_new_steps()
    proxy.hold_next("/manifest.json")
    job.until("save", proxy.held.is_set)
    victims = job.until("processes", lambda: job.savers() if savers else job.trainers())
    job.kill(*(victims[rank] for rank in ranks))
    proxy.release()


@pytest.mark.parametrize(("ranks", "seed"), [(2, 21), pytest.param(3, 22, marks=pytest.mark.slow)])
def test_killed_ranks_change_no_bit(
    options: Options, proxy: Proxy, undisturbed: Undisturbed, ranks: int, seed: int
) -> None:
    dice = random.Random(seed)
    with start(options, ranks) as job:
        kills.trainers(job, dice)
        in_a_save(job, proxy, 0)
        kills.trainers(job, dice, ranks)
        in_a_save(job, proxy, ranks - 1)
        kills.after_the_fork(job, dice, 0)
        kills.before_its_first_step(job, dice, 1)
        assert_ended_as(job, undisturbed, ranks)


@pytest.mark.parametrize(("ranks", "seed"), [(3, 24), pytest.param(2, 23, marks=pytest.mark.slow)])
def test_killed_savers_change_no_bit(
    options: Options, proxy: Proxy, undisturbed: Undisturbed, ranks: int, seed: int
) -> None:
    dice = random.Random(seed)
    with start(options, ranks) as job:
        kills.a_saver(job, dice, ranks - 1)
        in_a_save(job, proxy, 0, savers=True)
        in_a_save(job, proxy, ranks - 1, savers=True)
        assert_ended_as(job, undisturbed, ranks)


def test_a_killed_watcher_and_a_killed_supervisor_change_no_bit(options: Options, undisturbed: Undisturbed) -> None:
    dice = random.Random(25)
    with start(options, 3, restarts=2) as job:
        kills.a_watcher(job, dice, 1)
        kills.a_supervisor(job, dice, 2)
        assert_ended_as(job, undisturbed, 3)


def test_everything_killed_in_the_middle_of_a_save_goes_on_from_the_save_before(
    options: Options, proxy: Proxy, undisturbed: Undisturbed
) -> None:
    dice = random.Random(26)
    with start(options, 3) as job:
        job.until("commit", lambda: evidence.committed(Place(options.run)))
        in_a_save(job, proxy)
        job.kill_all()
    with start(options, 3) as job:
        kills.the_agent(job, dice)
    with start(options, 3) as job:
        assert_ended_as(job, undisturbed, 3)


def test_a_start_while_the_server_is_away_says_so_and_begins_when_it_is_back(
    options: Options, undisturbed: Undisturbed, s3: Server
) -> None:
    s3.kill()
    with start(options, 2) as job:
        job.until("word of it", lambda: f"{options.run}: no answer from " in job.output.read_text())
        s3.start()
        assert_ended_as(job, undisturbed, 2)


def test_a_server_that_is_killed_in_the_middle_of_saves_costs_no_bit(
    options: Options, undisturbed: Undisturbed, s3: Server
) -> None:
    """It is away for longer than a request is tried again, at times."""
    dice = random.Random(27)
    with start(options, 2) as job:
        for away_s in (0.2, 1.0, 3.0):
            job.until_new_steps(dice.randint(2, 5))
            s3.kill()
            time.sleep(away_s)
            s3.start()
        assert job.wait() == 0, job.tail()
    # What was to be deleted while the server was away is deleted by the next start.
    with start(options, 2) as job:
        assert_ended_as(job, undisturbed, 2)
