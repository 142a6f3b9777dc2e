"""What may go wrong between a run and its bucket. The campaigns are modules of their own, which `make faults` runs in
full; here they are run in a process of their own, cut down where they take long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid

import pytest

from tests.s3_server import BUCKET, Server


def campaign(name: str, *arguments: str) -> str:
    """What a campaign has printed. :raises AssertionError: a case went wrong."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.{name}", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr[-5000:]
    return found.stdout


@pytest.mark.parametrize(("client", "rounds"), [("obstore", 1000), ("s3fs", 30)])
def test_of_sixteen_writers_that_race_for_an_entry_exactly_one_wins(s3: Server, client: str, rounds: int) -> None:
    found = json.loads(campaign("race", f"s3://{BUCKET}/{uuid.uuid4().hex}", str(rounds), client))
    assert found == {"rounds": rounds, "winners": {"1": rounds}}


def test_a_writer_that_was_stopped_at_any_request_of_its_save_changes_nothing_later() -> None:
    last = campaign("leftovers_s3").splitlines()[-1]
    assert last.endswith("requests of a save; 0 went wrong")


@pytest.mark.parametrize(("act", "cases"), [("save", 30), ("restore", 15), ("gc", 8)])
def test_no_fault_at_any_request_loses_anything(act: str, cases: int) -> None:
    """The cases of `make faults`, so many of them by chance."""
    found = campaign("faults_s3", "--acts", act, "--sample", str(cases), "--seed", "1")
    assert found.splitlines()[-1] == f"{cases} cases; 0 went wrong"
