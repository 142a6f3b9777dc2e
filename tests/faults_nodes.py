"""A training on three nodes that are killed, cut off and stalled by chance, and come back: not a bit may differ.

python -m tests.faults_nodes --runs 5 --faults 4
python -m tests.faults_nodes --seed 3               # one that failed, again
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster import STEPS, assert_ended_as, cluster, disturb, undisturbed_in


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="how many runs, with seeds from 0 on")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--faults", type=int, default=4, help="in each run")
    chosen = parser.parse_args()
    steps = STEPS // 2 * (chosen.faults + 1)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="dtrain-nodes-") as name:
        undisturbed = undisturbed_in(Path(name) / "undisturbed", steps)
        for seed in [chosen.seed] if chosen.seed is not None else range(chosen.runs):
            dice = random.Random(seed)
            done: list[str] = []
            begun = time.monotonic()
            try:
                with cluster(Path(name) / str(seed), least=2, most=3, steps=steps) as job:
                    for _ in range(chosen.faults):
                        what, rank = (
                            dice.choice(["kill", "cut", "freeze"] if job.nodes.apart else ["kill"]),
                            dice.randrange(3),
                        )
                        done.append(f"{what} rank {rank}")
                        disturb(job, what, rank)
                    assert_ended_as(job, undisturbed)
            except AssertionError as error:
                wrong += 1
                print(f"seed {seed}: WRONG after {', '.join(done)}: {error}", flush=True)
                continue
            print(f"seed {seed}: same bits, {time.monotonic() - begun:.0f} s; {', '.join(done)}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
