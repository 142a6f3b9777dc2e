"""Many runs, each killed several times by chance: none may hang, leave something behind, or differ in a bit.

    python -m tests.campaign --seeds 20 --ranks 2,3 --kills 5
    python -m tests.campaign --seed 17 --ranks 3             # one that failed, again

A line for each run says what was killed and when. The exit code is 1 if any run went wrong; what it left is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import evidence, kills
from tests.evidence import Evidence
from tests.jobs import PATIENCE_S, Job, start
from tests.train_job import Options

STEPS_A_KILL = 14
"""Steps that a run has for each kill; each waits for a few new ones first."""

Kill = Callable[[Job, random.Random], str]


def any_rank(job: Job, dice: random.Random) -> int:
    return dice.randrange(job.ranks)


# What is killed, how often in proportion, and whether the job has to be started again by hand.
TARGETS: tuple[tuple[int, bool, Kill], ...] = (
    (6, False, kills.trainers),
    (3, False, lambda job, dice: kills.trainers(job, dice, dice.randint(1, job.ranks))),
    (4, False, lambda job, dice: kills.in_a_save(job, dice, any_rank(job, dice))),
    (2, False, lambda job, dice: kills.in_a_save(job, dice, *range(job.ranks))),
    (2, False, lambda job, dice: kills.in_a_save(job, dice, any_rank(job, dice), savers=True)),
    (2, False, lambda job, dice: kills.a_saver(job, dice, any_rank(job, dice))),
    (2, False, lambda job, dice: kills.after_the_fork(job, dice, any_rank(job, dice))),
    (2, False, lambda job, dice: kills.before_its_first_step(job, dice, any_rank(job, dice))),
    (2, False, lambda job, dice: kills.a_supervisor(job, dice, any_rank(job, dice))),
    (1, False, lambda job, dice: kills.a_watcher(job, dice, any_rank(job, dice))),
    (2, True, kills.the_agent),
    (1, True, kills.everything_in_a_save),
)


def run_once(options: Options, ranks: int, dice: random.Random, count: int) -> list[str]:
    """Run a job to its end, and kill so much of it on the way. :returns: what was killed, in words."""
    done: list[str] = []
    planned = dice.choices(TARGETS, [weight for weight, _, _ in TARGETS], k=count)
    try:
        while True:
            with start(options, ranks, restarts=count) as job:
                while planned:
                    _, ends, kill = planned.pop(0)
                    done.append(kill(job, dice))
                    if ends:
                        break
                else:
                    code = job.wait(PATIENCE_S + 0.1 * options.steps)
                    assert code == 0, f"the job ended with {code}\n{job.tail()}"
                    return done
    except AssertionError as error:
        raise AssertionError(f"after [{'; '.join(done)}]: {error}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds, from 0 on")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--ranks", default="2,3", help="numbers of ranks, separated by commas")
    parser.add_argument("--kills", type=int, default=5, help="kills in a run")
    chosen = parser.parse_args()
    worlds = [int(ranks) for ranks in chosen.ranks.split(",")]
    seeds = [chosen.seed] if chosen.seed is not None else list(range(chosen.seeds))
    root = Path(tempfile.mkdtemp(prefix="dtrain-campaign-"))
    undisturbed: dict[int, Evidence] = {}
    failed = 0

    def options_for(name: str, step_s: float = 0.02) -> Options:
        folder = root / name
        steps = STEPS_A_KILL * (chosen.kills + 1)
        return Options(run=str(folder / "run"), evidence=str(folder / "evidence"), steps=steps, step_s=step_s)

    for ranks in worlds:
        options = options_for(f"undisturbed-{ranks}", 0.0)
        run_once(options, ranks, random.Random(0), 0)
        undisturbed[ranks] = evidence.of_run(options)
    for seed in seeds:
        for ranks in worlds:
            options = options_for(f"seed-{seed}-ranks-{ranks}")
            started = time.monotonic()
            try:
                done = run_once(options, ranks, random.Random(f"{seed}/{ranks}"), chosen.kills)
                evidence.assert_same(evidence.of_run(options), undisturbed[ranks])
                evidence.assert_nothing_left(options)
            except AssertionError as error:
                failed += 1
                again = f"python -m tests.campaign --seed {seed} --ranks {ranks} --kills {chosen.kills}"
                print(f"seed {seed} ranks {ranks}: WRONG: {error}\n  again: {again}", flush=True)
                continue
            took = time.monotonic() - started
            print(f"seed {seed} ranks {ranks}: same bits, {took:.0f} s; killed {'; '.join(done)}", flush=True)
            shutil.rmtree(root / f"seed-{seed}-ranks-{ranks}")
    if failed:
        print(f"{failed} of {len(seeds) * len(worlds)} runs went wrong; what they left is in {root}")
        return 1
    with contextlib.suppress(OSError):
        shutil.rmtree(root)
    print(f"{len(seeds) * len(worlds)} runs, {len(seeds) * len(worlds) * chosen.kills} kills: every bit the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
