"""The best models and the end of a run, whatever is killed meanwhile: as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dtrain
from dtrain.checkpoint import load
from dtrain.errors import ConfigError
from dtrain.observe.events import EVENTS, read_lines
from dtrain.training.selection import Selection
from tests.choices import KILLS, Chosen, command, killed, undisturbed
from tests.jobs import ROOT, Job
from tests.saving import condemn_all
from tests.training import train
from tests.world import alone


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("kill", KILLS)
def test_kills_leave_the_same_best_models_and_the_same_end(
    kill: Callable[[Job, random.Random], None], clean: Chosen, tmp_path: Path
) -> None:
    assert killed(tmp_path, kill, seed=0) == clean


def test_a_stopped_run_stays_stopped_until_it_is_told_to_go_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(STOPPING)

    def start(*options: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "run"), *options],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = start()
    assert "steps 1 2 3 4 5\n" in said
    why = "stopped: step 5 of 20, saved: val/loss was 1 at its best, and has not been better in 3 measurements since"
    assert why in said
    again = start()
    assert "steps\n" in again
    assert why in again
    said = start("--go-on", "--crash")
    assert "killed by SIGKILL" in said
    assert "steps 6 7 8\n" in said, "a failure before anything new is saved doesn't have it stop again"
    assert "steps\n" in start()


STOPPING = """
import os
import sys
import torch
from torch import nn
import dtrain

class Falling:
    def __init__(self): self.values = iter(())
    def update(self, *_): pass
    def compute(self): return [3.0, 1.0, 1.5, 1.0, 2.0, 4.0, 5.0, 6.0][at - 1]
    def reset(self): pass

def main(run):
    global at
    model = run.parallelize(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = run.data([torch.ones(2) for _ in range(8)])
    run.track(model=model, optimizer=optimizer)
    done = []
    for step in run.steps(20):
        if "--crash" in sys.argv and not os.path.exists(mark := sys.argv[1] + "/crashed"):
            open(mark, "w").close()
            os.kill(os.getpid(), 9)
        for x in step.micro_batches(data):
            step.backward(model(x).square().sum(), count=len(x))
        step.update(optimizer)
        at = step.number
        run.evaluate(model, [(torch.ones(2), torch.ones(1))], {"loss": Falling()})
        done.append(step.number)
    print("steps", *done)

dtrain.launch(main, dtrain.Config(
    dir=sys.argv[1], global_batch=4, micro_batch=4, keep_best=dtrain.Best("val/loss"),
    early_stop=dtrain.EarlyStop("val/loss", patience=3), resume_stopped="--go-on" in sys.argv,
))
"""


def test_the_command_shows_the_ranking(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(STOPPING)
    run = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), str(run)], env=environment, check=True, timeout=60, capture_output=True
    )
    done = command("checkpoint", "best", str(run))
    assert done.returncode == 0, done.stderr
    head, first, *_ = done.stdout.splitlines()
    assert head.split() == ["step", "val/loss", "committed", "attempt"]
    assert first.split()[:3] == ["1", "2", "1"]
    moved = run.rename(tmp_path / "elsewhere")
    assert load(moved, {"model": nn.Linear(2, 1)}, step="best").step == 2
    assert json.loads(command("checkpoint", "best", str(moved), "--json").stdout)[0]["step"] == 2
    other = command("checkpoint", "best", str(moved), "--metric", "val/loss", "--mode", "max", "--json")
    assert [row["step"] for row in json.loads(other.stdout)] == [1, 5, 2]
    wrong = command("checkpoint", "best", str(moved), "--metric", "val/f1", "--mode", "max")
    assert wrong.returncode == 2
    assert "no checkpoint has 'val/f1'; they have: val/loss" in wrong.stderr
    condemn_all(moved)  # where there is no other, they are taken all the same
    assert load(moved, {"model": nn.Linear(2, 1)}, step="best").step == 2


def test_ties_keep_the_older_and_what_is_no_number_is_never_the_best() -> None:
    selection = Selection(dtrain.Best("m", mode="max", k=2), None)
    assert selection.learn(1, {"m": 1.0})
    assert not selection.learn(2, {"m": float("nan")})
    assert not selection.learn(3, {"m": float("inf")})
    assert selection.learn(4, {"m": 1.0})
    assert not selection.learn(5, {"m": 1.0})
    assert not selection.learn(6, {"other": 9.0})
    assert selection.learn(7, {"m": 2.0})
    assert selection.best == [(2.0, 7), (1.0, 1)]


@pytest.mark.parametrize(
    ("stop", "values", "end"),
    [
        (dtrain.EarlyStop("m", patience=2), [3, 2, 2, 2], 4),
        (dtrain.EarlyStop("m", patience=2, min_delta=0.5), [3, 2.8, 2.6], 3),
        (dtrain.EarlyStop("m", patience=9, threshold=1.0), [3, 2, 1.0], 3),
        (dtrain.EarlyStop("m", mode="max", patience=9, threshold=0.9), [0.5, 0.95], 2),
        (dtrain.EarlyStop("m", patience=2), [float("nan"), float("nan")], 2),
    ],
)
def test_a_run_is_over_at_the_step_that_follows_from_its_measurements(
    stop: dtrain.EarlyStop, values: list[float], end: int
) -> None:
    selection = Selection(None, stop)
    for step, value in enumerate(values, 1):
        assert not selection.ended
        kept = selection.state()
        selection = Selection(None, stop)
        selection.load(kept, [], resume=False)
        selection.learn(step, {"m": value})
        assert bool(selection.ended) == (step == end), selection.ended


def test_a_measurement_that_is_saved_as_well_counts_once() -> None:
    selection = Selection(None, dtrain.EarlyStop("m", patience=2))
    for step, value in enumerate((1.0, 2.0), 1):
        for _ in range(2):
            selection.learn(step, {"m": value})
    assert selection.ended == ""
    selection.learn(3, {"m": 2.0})
    assert selection.ended == "m was 1 at its best, and has not been better in 2 measurements since"


def test_bad_criteria_are_named() -> None:
    for make, message in (
        (lambda: dtrain.Best("val/f1", mode="most"), "Best(mode='most') must be 'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: dtrain.Best(""), "Best('') must be the name of a metric"),
        (lambda: dtrain.EarlyStop("val/f1", patience=0), "EarlyStop(patience=0) must be a whole number, 1 or more"),
        (lambda: dtrain.EarlyStop("v", min_delta=-1), "EarlyStop(min_delta=-1) must be a number, 0 or more"),
        (lambda: dtrain.Guards(nonfinite="ignore"), "Guards(nonfinite='ignore') must be one of"),  # type: ignore[arg-type]
        (lambda: dtrain.Guards(compare_every=0), "Guards(compare_every=0) must be a whole number"),
        (lambda: config(early_stop="val/loss"), "early_stop='val/loss' must be a EarlyStop, such as"),
        (lambda: config(guards=None), "guards=None must be a Guards, such as dtrain.Guards(nonfinite='skip')"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert message in str(error.value)


def config(**options: Any) -> dtrain.Config:
    return dtrain.Config(dir="x", global_batch=1, micro_batch=1, **options)


@pytest.mark.parametrize(("given", "said"), [("score", 0), ("scores", 1)])
def test_what_comes_with_a_save_is_among_what_a_step_has_measured(tmp_path: Path, given: str, said: int) -> None:
    def seen(run: dtrain.Run, step: dtrain.Step) -> None:
        run._loop.learn({"val/loss": 1.0})  # as an evaluation does
        run.save(metrics={given: 2.0})

    alone(lambda: train(tmp_path, 2, seen=seen, early_stop=dtrain.EarlyStop("score", patience=9)))
    warned = [line["message"] for line in read_lines(tmp_path / EVENTS) if line["event"] == "warning"]
    expected = "step 1 has measured val/loss, scores, and early_stop goes by 'score', which is not among them"
    assert warned == [expected] * said
