"""The batch file as it is, on a SLURM of one machine; passed over where its packages aren't there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tests.saving import commits
from tests.slurm import Slurm, is_there, slurm

pytestmark = pytest.mark.skipif(
    not is_there(), reason="slurmctld, slurmd and slurm-client aren't installed, or no root"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def submit(cluster: Slurm, run: Path, *options: str, steps: int) -> int:
    job = str(ROOT / "tests" / "small_job.py"), str(run), "--steps", str(steps), "--step-s", "0.1"
    often = "--save-every", "10000", "--snapshot-every", "1"
    output = f"--output={cluster.folder}/{run.name}.out"
    sbatch = str(ROOT / "launch" / "slurm.sbatch")
    return cluster.submit(
        output, "--nodes=1", "--cpus-per-task=2", *options, sbatch, *job, *often, RUN=str(run), NPROC="2"
    )


def assert_saved_and_gone_on(cluster: Slurm, run: Path, steps: int) -> None:
    said = cluster.said()
    stopped = re.search(rf"stopped: step (\d+) of {steps}, saved", said)
    assert stopped is not None, said
    assert f"{run}: restored step {stopped[1]}, 2 ranks" in said
    assert commits(run) == [int(stopped[1]), steps]


def test_a_job_that_another_one_takes_the_place_of_is_saved_and_started_again(cluster: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "preempted"
    job = submit(cluster, run, steps=150)
    cluster.until_said("step 20 ", run.name)
    other = cluster.submit(f"--output={os.devnull}", "--partition=high", "--cpus-per-task=2", "--wrap=sleep 1")
    cluster.until(other, "COMPLETED")
    cluster.until(job, "COMPLETED", "FAILED", "CANCELLED")
    assert cluster.state(job) == "COMPLETED", cluster.said()
    assert_saved_and_gone_on(cluster, run, 150)


@pytest.mark.slow
def test_a_job_at_the_end_of_its_time_is_saved_and_started_again(cluster: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "too-long"
    job = submit(cluster, run, "--time=2", "--signal=B:USR1@70", steps=600)
    cluster.until(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert cluster.state(job) == "COMPLETED", cluster.said()
    assert "stopped by SIGTERM" in cluster.said()
    assert commits(run)[-1] == 600
