"""What can be killed, and when: each function waits for its moment, kills with SIGKILL, and says what it did.

A run stops by itself after a few generations in a row without a new step, so most of these let it get further first.
Where the moment is a short one, the process is stopped (SIGSTOP), looked at and only then killed: so it is known what
was hit.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time

from tests.evidence import attempt_under_way
from tests.jobs import Job, children
from tests.places import Place


def trainers(job: Job, dice: random.Random, count: int = 1, *, rank: int | None = None) -> str:
    """Some trainers, at once, at any moment of the steps and of what comes between them."""
    pids = _at_any_moment(job, dice)
    chosen = [rank] if rank is not None else sorted(dice.sample(sorted(pids), min(count, len(pids))))
    job.kill(*(pids[rank] for rank in chosen))
    return f"trainer {'+'.join(map(str, chosen))} at step {job.step()}"


def in_a_save(job: Job, dice: random.Random, *ranks: int, savers: bool = False) -> str:
    """Trainers, or savers, while a checkpoint is being written; before its commit, which rank 0's saver makes."""
    _at_any_moment(job, dice)
    run = Place(job.options.run)
    while True:
        attempt = job.until("save", functools.partial(attempt_under_way, run))
        time.sleep(dice.uniform(0, 0.02))
        found = job.until("saver of every rank", lambda: _all(job, job.savers()))
        os.kill(found[0], signal.SIGSTOP)
        caught = attempt_under_way(run) == attempt
        if caught:
            files = len(run.names(f"checkpoints/{attempt}"))
            victims = found if savers else job.trainers()
            job.kill(*(victims[rank] for rank in ranks if rank in victims))
        if not (savers and 0 in ranks and caught):
            os.kill(found[0], signal.SIGCONT)
        if caught:
            what = "saver" if savers else "trainer"
            return f"{what} {'+'.join(map(str, ranks))} with {files} files of {attempt} written"


def a_saver(job: Job, dice: random.Random, rank: int) -> str:
    """The process that writes a rank's checkpoints."""
    _at_any_moment(job, dice)
    job.kill(job.until("saver", lambda: job.savers().get(rank, 0)))
    return f"saver {rank} at step {job.step()}"


def after_the_fork(job: Job, dice: random.Random, rank: int) -> str:
    """A trainer, and then the one that takes its place, as soon as it exists."""
    _at_any_moment(job, dice)
    supervisor = job.supervisors()[rank]
    before = set(children(supervisor))
    job.kill(job.trainers()[rank])
    # The trainer is forked before the watcher.
    new = job.until("forked trainer", lambda: [pid for pid in children(supervisor) if pid not in before])
    job.kill(new[0])
    return f"trainer {rank} at step {job.step()} and the one after it when it was forked"


def before_its_first_step(job: Job, dice: random.Random, rank: int) -> str:
    """A trainer that is in its main, but hasn't come to a step.

    In a job that has just begun, the first trainer of this rank; else the one that takes its place.
    """
    known = len(job.lives())
    if known:
        known = _kill(job, _at_any_moment(job, dice)[rank])
    while True:
        step = job.step()
        pid = job.until("new trainer", functools.partial(job.born, rank, known))
        time.sleep(dice.uniform(0, 0.03))
        job.kill(pid)
        if pid not in job.traced():
            return f"trainer {rank} before its first step, after step {step}"
        known = _kill(job, _at_any_moment(job, dice)[rank])


def a_supervisor(job: Job, dice: random.Random, rank: int) -> str:
    """One that torchrun has to replace."""
    _at_any_moment(job, dice)
    job.kill(job.supervisors()[rank])
    return f"supervisor {rank} at step {job.step()}"


def a_watcher(job: Job, dice: random.Random, rank: int) -> str:
    """The process that tells a supervisor of another rank's end."""
    _at_any_moment(job, dice)
    job.kill(job.until("watcher", lambda: job.watchers().get(rank, 0)))
    return f"watcher {rank} at step {job.step()}"


def the_agent(job: Job, dice: random.Random) -> str:
    """torchrun itself. Everything below it must end by itself; the job has to be started again."""
    _at_any_moment(job, dice)
    job.kill(job.agent)
    job.until_gone()
    return f"agent at step {job.step()}"


def everything_in_a_save(job: Job, dice: random.Random) -> str:
    """All processes while a checkpoint is being written: the job has to be started again."""
    what = in_a_save(job, dice, *sorted(job.until("trainers", lambda: _all(job, job.trainers()))))
    job.kill_all()
    return f"everything: {what}"


def _at_any_moment(job: Job, dice: random.Random) -> dict[int, int]:
    """Wait for new steps, and then for a moment more. :returns: the trainers' process ids by rank."""
    job.until_new_steps(dice.randint(2, 5))
    time.sleep(dice.uniform(0, 0.1))
    return job.until("trainer of every rank", lambda: _all(job, job.trainers()))


def _all(job: Job, found: dict[int, int]) -> dict[int, int]:
    return found if len(found) == job.ranks else {}


def _kill(job: Job, pid: int) -> int:
    """:returns: how many trainers had come up until then."""
    known = len(job.lives())
    job.kill(pid)
    return known
