"""Gradients that aren't finite and bits that flip, at random: each is found in time, the right rank is named, and the
weights at the end are those of a run to which nothing happened, or that never saw the step's samples.

python -m tests.garbage --times 100
python -m tests.garbage --seed 7               # one that failed, again
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import jobs
from tests.jobs import read_lines
from tests.train_job import Options

STEPS = 12


def options(folder: Path, **chosen: Any) -> Options:
    usual: dict[str, Any] = {"steps": STEPS, "save_every": 4, "snapshot_every": 1, "step_s": 0.0}
    return Options(run=str(folder / "run"), evidence=str(folder / "evidence"), **usual | chosen)


def finished(job: Options, ranks: int) -> list[dict[str, str]]:
    """Let a job come to its end. :returns: each rank's digests."""
    with jobs.start(job, ranks) as started:
        code = started.wait()
        assert code == 0, f"it ended with {code}\n{started.tail()}"
    return [json.loads(path.read_text()) for path in sorted(Path(job.evidence).glob("result-*.json"))]


def events(job: Options, *kinds: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(Path(job.run) / "events.jsonl") if line["event"] in kinds]


class Cases:
    """Each by its seed.

    :param folder: for the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clean: dict[tuple[int, int], list[dict[str, str]]] = {}

    def clean(self, ranks: int, pass_over: int = 0) -> list[dict[str, str]]:
        """What a run comes to in which nothing happens, but that a step is left out."""
        if (ranks, pass_over) not in self._clean:
            job = options(self._folder / f"clean-{ranks}-{pass_over}", pass_over=pass_over)
            self._clean[ranks, pass_over] = finished(job, ranks)
        return self._clean[ranks, pass_over]

    def run(self, seed: int) -> str:
        """One case. :returns: what it was. :raises AssertionError: it didn't come out well."""
        dice = random.Random(seed)
        ranks, step = dice.choice([2, 3]), dice.randint(1, STEPS - 2)
        job = options(self._folder / str(seed), rank=dice.randrange(ranks))
        if seed % 2:
            how = dice.choice(["skip", "rollback"])
            job = replace(job, nan_at=step, guards={"nonfinite": how})
            what = f"rank {job.rank} of {ranks}, step {step}: its gradient isn't finite ({how})"
            assert finished(job, ranks) == self.clean(ranks, step), f"{what}: other weights"
            (found,) = events(job, "rolled_back", "skipped")[:1]
            assert found["step"] == step, f"{what}: found at {found['step']}"
            assert f"rank {job.rank} (" in found["reason"], f"{what}: {found['reason']}"
            return what
        every = dice.randint(1, 5)
        snapshots = dice.choice([1, 100])  # they are compared as well
        job = replace(job, flip_at=(step,), flip=seed, guards={"compare_every": every}, snapshot_every=snapshots)
        what = f"rank {job.rank} of {ranks}, after step {step}: a bit flips (compared every {every} steps)"
        assert finished(job, ranks) == self.clean(ranks), f"{what}: other weights"
        (found,) = events(job, "diverged")
        assert step <= found["step"] <= step + every, f"{what}: found at {found['step']}"
        named = [(event["rank"], event["times"]) for event in events(job, "erred")]
        assert named == [(job.rank, 1)], f"{what}: named {named}"
        return what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    parser.add_argument("--seed", type=int, help="this seed alone")
    chosen = parser.parse_args()
    wrong = 0
    seeds = range(chosen.first, chosen.first + chosen.times) if chosen.seed is None else [chosen.seed]
    with tempfile.TemporaryDirectory(prefix="dtrain-garbage-") as name:
        cases = Cases(Path(name))
        for seed in seeds:
            try:
                print(f"seed {seed}: {cases.run(seed)}: fine", flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"seed {seed}: WRONG: {error}", flush=True)
    print(f"{len(seeds) - wrong} of {len(seeds)} fine")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
