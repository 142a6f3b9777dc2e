"""Runs that nothing happened to, for the others to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests import evidence
from tests.evidence import Evidence
from tests.jobs import start
from tests.s3_server import Server, seaweed
from tests.train_job import Options
from tests.world import alone

STEPS = 60

Undisturbed = Callable[[int], Evidence]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The evidence of an undisturbed run of `STEPS` steps on so many ranks; each is run once."""

    @cache
    def of(ranks: int) -> Evidence:
        folder = tmp_path_factory.mktemp(f"undisturbed-{ranks}-")
        options = Options(run=str(folder / "run"), evidence=str(folder / "evidence"), steps=STEPS, step_s=0.0)
        with start(options, ranks) as job:
            assert job.wait() == 0, job.tail()
        found = evidence.of_run(options)
        evidence.assert_each_once_an_epoch(found)
        evidence.assert_nothing_left(options)
        return found

    return of


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server, one for all tests."""
    with seaweed(tmp_path_factory.mktemp("s3-")) as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked so in a process of its own: a client with threads would be no good for later forks."""
    if pyfuncitem.get_closest_marker("own_process") is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    alone(lambda: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}), timeout_s=120)
    return True


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, with what a client needs to know in this process's environment."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
