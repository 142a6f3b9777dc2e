"""Losses and gradients that aren't finite, losses that jump, and bits that flip: found, named, and without a trace in
the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.observe.report import history
from tests import jobs
from tests.evidence import assert_nothing_left, of_run
from tests.jobs import read_lines
from tests.train_job import Options

STEPS = 14


def job(tmp_path: Path, name: str, **options: Any) -> Options:
    chosen: dict[str, Any] = {"steps": STEPS, "save_every": 4, "snapshot_every": 1, "step_s": 0.0} | options
    return Options(run=str(tmp_path / name / "run"), evidence=str(tmp_path / name / "evidence"), **chosen)


def run(options: Options, ranks: int) -> str:
    """Let a job come to its end. :returns: what it printed."""
    with jobs.start(options, ranks) as started:
        assert started.wait() == 0, started.tail()
        assert_nothing_left(options)
        return started.output.read_text()


def events(options: Options, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(Path(options.run) / "events.jsonl") if line["event"] == kind]


def digests(options: Options) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(Path(options.evidence).glob("result-*.json"))]


@pytest.mark.parametrize(("how", "ranks"), [("skip", 2), ("rollback", 3)])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_no_trace(how: str, ranks: int, tmp_path: Path) -> None:
    guards = {"nonfinite": how}
    spoilt = job(tmp_path, how, nan_at=7, rank=1, guards=guards)
    said = run(spoilt, ranks)
    clean = job(tmp_path, "clean", pass_over=7)
    run(clean, ranks)
    assert digests(spoilt) == digests(clean)
    (found,) = events(spoilt, "rolled_back")
    assert found["step"] == 7
    assert "rank 1 (" in found["reason"], found
    assert sorted(found["samples"]["data"]) == sorted(of_steps(clean, 7))
    assert "step 7: the gradient isn't finite; it comes from rank 1" in said
    restored = [event["step"] for event in events(spoilt, "restored")]
    assert restored == ([6] if how == "skip" else [4]), "by what is in memory, or by the last checkpoint"
    (told,) = history(spoilt.run).left_out
    assert (told.step, told.rolled_back, told.samples) == (7, True, found["samples"])
    lines = [line for line in read_lines(Path(spoilt.run) / "metrics.jsonl") if line["step"] == 7]
    assert lines == [], "a step that was rolled back is none that counts"


def of_steps(options: Options, step: int) -> list[int]:
    """The samples of a step, which follow from its number alone."""
    from dtrain.training.order import Order
    from tests.train_job import GLOBAL_BATCH, SAMPLES

    return list(map(int, Order(SAMPLES, 7, shuffle=True).ids((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_bit_that_flips_in_a_copy_of_the_parameters_is_found_named_and_undone(ranks: int, tmp_path: Path) -> None:
    flipped = job(tmp_path, "flipped", flip_at=(6,), rank=1, guards={"compare_every": 5}, snapshot_every=100)
    run(flipped, ranks)
    clean = job(tmp_path, "clean")
    run(clean, ranks)
    assert of_run(flipped) == of_run(clean)
    (found,) = events(flipped, "diverged")
    assert found["step"] == 8, "before the next checkpoint, which would hold it"
    assert found["ranks"] == ([] if ranks == 2 else [1]), "of two copies, nobody can tell yet which is wrong"
    (named,) = events(flipped, "erred")
    assert (named["rank"], named["step"], named["times"]) == (1, 8, 1)
    assert [event["step"] for event in events(flipped, "restored")] == [4]


@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_computes_wrong_parameters_twice_stops_the_run(ranks: int, tmp_path: Path) -> None:
    flipped = job(tmp_path, "flipped", flip_at=(2, 9), rank=1, guards={"compare_every": 3}, snapshot_every=100)
    with jobs.start(flipped, ranks) as started:
        assert started.wait() != 0
        said = started.output.read_text()
    assert "rank 1 on " in said
    assert "has computed wrong parameters 2 times" in said
    assert [event["times"] for event in events(flipped, "erred")] == [1, 2]
    continued = replace(flipped, flip_at=())
    run(continued, ranks)
    clean = job(tmp_path, "clean")
    run(clean, ranks)
    assert digests(continued) == digests(clean), "what was saved before is good"


def test_a_run_that_is_to_stop_says_whose_loss_it_was(tmp_path: Path) -> None:
    spoilt = job(tmp_path, "spoilt", nan_at=7, rank=1)
    with jobs.start(spoilt, 2) as started:
        assert started.wait() != 0
        said = started.output.read_text()
    assert "Garbage: step 7: the gradient isn't finite; it comes from rank 1 (" in said
    (found,) = events(spoilt, "garbage")
    assert sorted(found["samples"]["data"]) == sorted(of_steps(spoilt, 7))
    committed = [event["step"] for event in events(spoilt, "committed")]
    assert committed == [4, 6], "the last good step is saved"
    mended = replace(spoilt, nan_at=0)
    run(mended, 2)
    clean = job(tmp_path, "clean")
    run(clean, 2)
    assert digests(mended) == digests(clean)


def test_what_is_wrong_in_memory_is_neither_gone_on_from_nor_saved_at_the_end(tmp_path: Path) -> None:
    """Snapshots are looked at as well: else a kill would make a mixture of two copies the only one."""
    late: dict[str, Any] = {"save_every": 100, "guards": {"compare_every": 100}}
    flipped = job(tmp_path, "flipped", flip_at=(6,), rank=1, raise_at=7, **late)
    run(flipped, 2)
    clean = job(tmp_path, "clean", save_every=100)
    run(clean, 2)
    assert digests(flipped) == digests(clean)
    (found,) = events(flipped, "diverged")
    assert found["step"] == 6
