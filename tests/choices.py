"""Kills while a run measures, saves the best model, or deletes the fourth best: the same best three models, the same
last step and the same weights as without.

python -m tests.choices --kills 20
python -m tests.choices --seed 3               # one that failed, again
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import jobs
from tests.evidence import assert_nothing_left
from tests.jobs import ROOT, Job, read_lines
from tests.places import Place
from tests.train_job import Options

EVERY, PATIENCE, STEPS = 3, 7, 200
TIMES = 3
"""Kills in a run."""


@dataclass(frozen=True)
class Chosen:
    """What a run has come to."""

    best: list[tuple[int, float]]
    """Step and metric of the best three, the best first."""
    last: int
    """The step that it stopped after."""
    digests: list[dict[str, str]]


def job(folder: Path, **options: Any) -> Options:
    chosen: dict[str, Any] = {"steps": STEPS, "save_every": 10, "evaluate_every": EVERY, "patience": PATIENCE} | options
    return Options(run=str(folder / "run"), evidence=str(folder / "evidence"), **chosen)


def of(options: Options) -> Chosen:
    done = command("checkpoint", "best", options.run, "--json")
    assert done.returncode == 0, done.stderr
    best = [(row["step"], row["value"]) for row in json.loads(done.stdout)]
    committed = [
        line["step"] for line in read_lines(Path(options.run) / "events.jsonl") if line["event"] == "committed"
    ]
    digests = [json.loads(path.read_text()) for path in sorted(Path(options.evidence).glob("result-*.json"))]
    return Chosen(best[:3], max(committed), digests)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "dtrain.cli.main", *words]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=60)


def undisturbed(folder: Path) -> Chosen:
    """What a run comes to to which nothing happens."""
    options = job(folder, step_s=0.0)
    with jobs.start(options, 2) as started:
        assert started.wait() == 0, started.tail()
        assert "and has not been better in 7 measurements since" in started.output.read_text()
    found = of(options)
    assert found.last < STEPS, "it has stopped early"
    assert len(found.best) == 3
    assert_nothing_left(options)
    return found


def in_a_validation(job: Job, dice: random.Random) -> None:
    """Kill trainers while they measure, or just behind it, before the model that was found is saved."""
    phases = Path(job.options.evidence) / "phases.jsonl"
    seen = len(list(read_lines(phases)))
    what = dice.choice(["begun", "ended"])
    job.until("validation", lambda: [line for line in list(read_lines(phases))[seen:] if line["what"] == what])
    time.sleep(dice.choice([0.0, dice.uniform(0, 0.02)]))
    victims = list(job.trainers().values())
    job.kill(*dice.sample(victims, dice.randint(1, len(victims))) if victims else ())


def in_a_deletion(job: Job, dice: random.Random) -> None:
    """Kill savers when one has just written that it is about to delete a checkpoint, and maybe all that trains."""
    run = Place(job.options.run)

    def retired() -> int:
        names = [name for name in run.names("log") if name[0].isdigit()]
        return sum(json.loads(run.read(f"log/{name}"))["entry"]["kind"] == "retire" for name in names)

    before = retired()
    job.until("deletion", lambda: retired() > before)
    victims = list(job.savers().values())
    if dice.random() < 0.5:
        victims += job.trainers().values()
    job.kill(*victims)


def in_a_save(job: Job, dice: random.Random) -> None:
    """Kill the savers while they write, so that a model that was found is lost on its way, and a trainer with them."""
    run = Place(job.options.run)
    known = set(run.names("checkpoints"))
    job.until("save", lambda: set(run.names("checkpoints")) - known)
    victims = list(job.savers().values())
    if dice.random() < 0.7:
        victims += job.trainers().values()
    job.kill(*victims)


KILLS: list[Callable[[Job, random.Random], None]] = [in_a_validation, in_a_deletion, in_a_save]


def killed(folder: Path, kill: Callable[[Job, random.Random], None], seed: int) -> Chosen:
    """What a run comes to in which something is killed a few times."""
    dice = random.Random(f"{kill.__name__}/{seed}")
    options = job(folder, step_s=0.01)
    with jobs.start(options, 2) as started:
        for _ in range(TIMES):
            try:
                kill(started, dice)
            except jobs.Hang:
                if "has not been better" not in started.tail():  # it is over before the last kill
                    raise
                break
        assert started.wait() == 0, started.tail()
    assert_nothing_left(options)
    return of(options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many at least, a few in each run")
    parser.add_argument("--seed", type=int, help="this run alone")
    chosen = parser.parse_args()
    seeds = range(-(-chosen.kills // TIMES)) if chosen.seed is None else [chosen.seed]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="dtrain-choices-") as name:
        right = undisturbed(Path(name) / "undisturbed")
        print(f"best: {right.best}; ends after step {right.last}", flush=True)
        for seed in seeds:
            kill = KILLS[seed % len(KILLS)]
            found = killed(Path(name) / str(seed), kill, seed)
            wrong += found != right
            print(
                f"seed {seed}: {TIMES} kills {kill.__name__}: {'the same' if found == right else f'WRONG: {found}'}",
                flush=True,
            )
    print(f"{len(seeds) - wrong} of {len(seeds)} runs the same, {TIMES * len(seeds)} kills")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
