"""A machine that is wanted back: the step is finished, saved and committed, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import children
from tests.saving import commits
from tests.scripts import ROOT, Ended, Program, run, started

OFTEN = ("--steps", 10_000, "--step-s", 0.02, "--save-every", 10_000, "--snapshot-every", 1)
TORCHRUN = ("--max-restarts=3",)


def supervisor(program: Program, rank: int) -> int:
    return sorted(children(program.pid))[rank]


def trainer(program: Program, rank: int) -> int:
    (found,) = [pid for pid in children(supervisor(program, rank)) if name_of(pid) == "dtrain-trainer"]
    return found


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def ended_by(root: Path, end: Callable[[Program], None], *args: object, ranks: int = 2) -> tuple[Ended, int]:
    """:returns: how it ended, and the last step that it did."""
    with started(root, *OFTEN, *args, ranks=ranks, torchrun=TORCHRUN if ranks else ()) as program:
        program.wait_for(lambda: program.steps() >= 5)
        end(program)
        found = program.end()
        return found, program.steps()


def assert_saved_and_going_on(root: Path, found: Ended, done: int, ranks: int = 2) -> None:
    assert commits(root) == [done], "the step that it was in is finished, and saved"
    assert f"stopped: step {done} of 10000, saved" in found.said
    assert "starting it again" not in found.err
    again = run(root, "--steps", done + 1, ranks=ranks)
    assert again.code == 0, again.err
    assert again.out.startswith(f"step {done + 1} "), "the same command goes on"


@pytest.mark.parametrize("who", ["supervisor 0", "supervisor 1", "trainer 1"])
def test_a_signal_to_any_process_ends_all_ranks_after_the_same_step(tmp_path: Path, who: str) -> None:
    number = signal.SIGUSR1 if who == "supervisor 1" else signal.SIGTERM

    def end(program: Program) -> None:
        kind, rank = who.split()
        os.kill((supervisor if kind == "supervisor" else trainer)(program, int(rank)), number)

    found, done = ended_by(tmp_path, end)
    assert found.code == 1, "torchrun's own"
    assert f"{number.name}: stopping after this step, with a checkpoint, within 25 s" in found.said
    assert f"stopped by {number.name}: the newest checkpoint is that of step {done}" in found.said
    assert found.err.count("nothing saved yet") == 1, "torchrun has not started it again"
    assert_saved_and_going_on(tmp_path, found, done)


def test_sigterm_to_torchrun_ends_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    found, done = ended_by(tmp_path, lambda program: os.kill(program.pid, signal.SIGTERM))
    assert found.code == 1
    agents = "SIGTERM of torchrun's agent, which decides what is next"
    assert f"{agents}: stopping after this step, with a checkpoint, within 25 s" in found.said
    assert f"stopped by {agents}: the newest checkpoint is that of step {done}" in found.said
    assert_saved_and_going_on(tmp_path, found, done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_without_torchrun_the_exit_code_says_that_it_was_preempted(tmp_path: Path, number: int) -> None:
    found, done = ended_by(tmp_path, lambda program: os.kill(program.pid, number), ranks=0)
    assert found.code == 143
    assert_saved_and_going_on(tmp_path, found, done, ranks=0)


def test_a_notice_file_ends_the_run_and_an_old_one_does_not(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    notice.touch()
    os.utime(notice, (1, 1))

    def end(program: Program) -> None:
        time.sleep(1.5)
        assert commits(tmp_path / "run") == []
        notice.touch()

    found, done = ended_by(tmp_path / "run", end, "--option", "notice_file", str(notice), ranks=0)
    assert found.code == 143
    assert f"{notice} is there: stopping after this step, with a checkpoint, within 25 s" in found.said
    assert_saved_and_going_on(tmp_path / "run", found, done, ranks=0)


def test_a_step_that_outlasts_the_grace_time_is_given_up_and_the_newest_snapshot_saved(tmp_path: Path) -> None:
    asked = 0.0

    def end(program: Program) -> None:
        nonlocal asked
        program.wait_for(lambda: (tmp_path / "troubled").exists())
        asked = time.monotonic()
        os.kill(program.pid, signal.SIGTERM)

    slow = ("--trouble", "sleep", "--trouble-at", 7, "--option", "grace_s", 5)
    found, _ = ended_by(tmp_path, end, *slow)
    assert time.monotonic() - asked < 6 + 2, "torchrun itself takes a moment"
    assert commits(tmp_path) == [6]
    assert "stopped by SIGTERM (the step did not come to its end within 70% of grace_s=5)" in found.err


def test_what_is_behind_the_loop_is_for_a_training_that_is_done(tmp_path: Path) -> None:
    found, _ = ended_by(tmp_path, lambda program: program.interrupt(), "--say-end", ranks=0)
    assert found.code == 130
    assert "behind the loop" not in found.out
    assert "behind the loop" in run(tmp_path, "--steps", 1, "--say-end").out


def test_what_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    with started(tmp_path, *OFTEN, nohup=True) as program:
        program.wait_for(lambda: program.steps() >= 5)
        os.kill(program.pid, signal.SIGHUP)
        done = program.steps()
        program.wait_for(lambda: program.steps() >= done + 20)
        assert "SIGHUP" not in program.err()


def test_processes_that_main_starts_end_as_they_like_without_ending_the_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(WITH_A_POOL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=3"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stopping after this step" not in done.stderr
    assert commits(tmp_path / "run")[-1] == 3


WITH_A_POOL = """
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import torch
from torch import nn
import dtrain

def main(run):
    model = run.parallelize(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = run.data([torch.ones(2) for _ in range(8)])
    run.track(model=model, optimizer=optimizer)
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends its workers by SIGTERM
        assert pool.map(signal.getsignal, [signal.SIGTERM]) == [signal.SIG_DFL]
    for _ in range(50):  # processes that are told to end before they have run a line
        child = os.fork()
        if not child:
            time.sleep(1)
            os._exit(1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    # A program of its own, which has the environment from this one, and an error that nobody catches.
    program = "import dtrain; dtrain.Config(dir='x', global_batch=3, micro_batch=2)"
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ConfigError" in failed.stderr, failed.stderr
    for step in run.steps(3):
        for x in step.micro_batches(data):
            step.backward(model(x).square().sum(), count=len(x))
        step.update(optimizer)

dtrain.launch(main, dtrain.Config(dir=sys.argv[1], global_batch=4, micro_batch=4))
"""
