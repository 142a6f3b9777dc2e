"""When a run gives up, what it passes over, and which rank it calls slow."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import dtrain.checkpoint
from dtrain.observe.events import METRICS, read_lines
from tests.saving import commits
from tests.scripts import run
from tests.test_start_errors import events

POISON = ("--steps", 6, "--poison-step", 3, "--option", "reduction", "exact")


def weights(root: Path) -> list[torch.Tensor]:
    model = nn.Linear(8, 1)
    dtrain.checkpoint.load(root, {"model": model})
    return list(model.parameters())


def test_a_run_that_fails_too_often_stops_though_it_comes_further_each_time(tmp_path: Path) -> None:
    limit = ("--option", "max_failures_per_hour", 3)
    found = run(tmp_path, "--steps", 100, "--snapshot-every", 1, "--lives-steps", 2, *limit)
    assert found.code == 1
    assert len(events(tmp_path, "failed")) == 4
    assert (
        "stopped: 4 failures within an hour, and max_failures_per_hour=3; the last: rank 0 failed: "
        "ArithmeticError: planted at step 9 on rank 0"
    ) in found.said
    assert commits(tmp_path)[-1] == 8, "nothing of it is lost"


def test_the_snapshots_in_memory_outlive_a_supervisor(tmp_path: Path) -> None:
    """torchrun ends all supervisors when one has died."""
    args = ("--steps", 12, "--save-every", 1000, "--snapshot-every", 1, "--kill-supervisor-at", 3, "--step-s", 0.05)
    found = run(tmp_path, *args, ranks=2, torchrun=("--max-restarts=1",), fresh=True)
    assert found.code == 0, found.err
    (restored,) = events(tmp_path, "restored")
    assert (restored["step"], restored["place"]) == (2, "memory"), "only the step that it was in is done again"
    assert commits(tmp_path) == [12]


def test_the_limit_holds_over_restarts_by_torchrun(tmp_path: Path) -> None:
    args = ("--steps", 100, "--snapshot-every", 1, "--lives-steps", 2, "--kill-supervisor-at", 4)
    found = run(tmp_path, *args, "--option", "max_failures_per_hour", 3, ranks=2, torchrun=("--max-restarts=5",))
    assert found.code == 1
    assert "stopped: 4 failures within an hour" in found.err
    assert len(events(tmp_path, "failed")) == 4


def test_the_micro_batch_that_kills_is_named(tmp_path: Path) -> None:
    found = run(tmp_path, *POISON, ranks=2)
    assert found.code == 1
    why = "stopped: no new step in 3 generations; the last time rank {} failed: killed by SIGKILL (in micro-batch {} of"
    assert any(f"{why.format(rank, rank)} step 3)" in found.said for rank in range(2))


def test_a_step_that_kills_is_passed_over_and_its_samples_are_written_down(tmp_path: Path) -> None:
    skip = ("--option", "skip_poison_batch", "true")
    for root, ranks in ((tmp_path / "two", 2), (tmp_path / "one", 1)):
        found = run(root, *POISON, *skip, ranks=ranks)
        assert found.code == 0, found.err
        assert commits(root) == [3, 4, 6], "the one that is passed over is saved at once"
        assert "the last of 3 failures without a new step: step 3 is skipped; starting it again" in found.err
        assert [line["step"] for line in read_lines(root / METRICS)][-5:] == [1, 2, 4, 5, 6]
        (skipped,) = events(root, "skipped")
        assert skipped["step"] == 3
        samples = skipped["samples"]
        assert isinstance(samples, dict)
        assert len(set(samples["data"])) == 8
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(map(torch.equal, one, two))
    again = run(tmp_path / "two", "--steps", 7, "--option", "reduction", "exact")
    assert again.code == 0, again.err


def test_a_rank_that_is_slow_step_after_step_is_named_once(tmp_path: Path) -> None:
    found = run(tmp_path, "--steps", 60, "--trouble", "slow", "--trouble-at", 0, ranks=2)
    assert found.code == 0, found.err
    (slow,) = events(tmp_path, "slow")
    assert slow["rank"] == 1
    assert "rank 1 holds up the others: it is at work by itself for 5" in found.err


def test_ranks_that_are_alike_are_not_called_slow(tmp_path: Path) -> None:
    assert run(tmp_path, "--steps", 60, "--step-s", 0.02, ranks=2).code == 0
    assert events(tmp_path, "slow") == []
