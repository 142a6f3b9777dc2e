"""A rank that doesn't come any further is noticed, named, and started again, whatever it is that holds it up."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.elastic.page import Page, Phase
from dtrain.elastic.watchdog import Report, Watchdog, blamed
from tests.saving import commits
from tests.scripts import Ended, run
from tests.test_start_errors import events

RANKS = 2
QUICK = ("--option", "hang_after_s", 1, "--steps", 8, "--snapshot-every", 1)
SLOWEST_S = 60
"""A limit ten times as long holds up to the end of the first step; what comes to it has waited in vain."""


def hung(root: Path, *args: object, ranks: int = RANKS) -> tuple[Ended, str]:
    """A run in which a rank hangs once. :returns: its end, and what was said of the hang."""
    found = run(root, *QUICK, *args, ranks=ranks)
    assert found.code == 0, found.err
    assert commits(root)[-1] == 8
    assert found.seconds < SLOWEST_S
    (failed,) = events(root, "failed")
    cause = str(failed["cause"])
    assert f"rank {failed['rank']} failed after step {failed['step']}: {cause}; starting it again" in found.said
    return found, cause


def stacks(cause: str, rank: int) -> str:
    folder = re.search(r"stacks of all ranks: (.*)\)", cause)
    assert folder is not None, cause
    return (Path(folder[1]) / f"rank-{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("trouble", "frame"), [("spin", "small_job.py"), ("sleep", "small_job.py"), ("stop", None), ("collective", None)]
)
def test_a_rank_that_hangs_is_named_with_its_place_and_started_again(
    tmp_path: Path, trouble: str, frame: str | None
) -> None:
    _, cause = hung(tmp_path, "--trouble", trouble)
    assert re.match(r"hang: rank 1 \(\S+, process \d+\) has been in the forward pass of step 4, micro-batch 1 ", cause)
    assert ", and the others wait (stacks" in cause
    assert ("stopped by a signal" in cause) == (trouble == "stop")
    mine, others = stacks(cause, 1), stacks(cause, 0)
    assert "_engine_run_backward" in others
    if frame is not None:
        assert re.search(rf'{frame}", line \d+ in trouble', mine), mine
    elif trouble == "stop":
        assert "It couldn't write its stacks." in mine
    else:
        assert "in barrier" in mine


def test_a_rank_that_is_held_up_behind_a_backward_pass_is_named_and_not_those_that_wait(tmp_path: Path) -> None:
    _, cause = hung(tmp_path, "--trouble", "sleep", "--trouble-behind", "--micro-batch", 2)
    assert "hang: rank 1 " in cause
    assert " has been in the loop's body after a backward pass of step 4, micro-batch 2 " in cause
    assert ", and the others wait (stacks" in cause


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_that_is_stuck_is_named_with_the_line_that_it_is_stuck_in(tmp_path: Path, workers: int) -> None:
    ids = sample_of_step(tmp_path / "look", 4)
    _, cause = hung(tmp_path / "run", "--stuck-sample", ids[-1], "--workers", workers)
    assert "hang: rank 1 " in cause
    assert " has been in loading data of step 4, micro-batch 1 " in cause
    assert re.search(r'small_job.py", line \d+ in __getitem__', stacks(cause, 1))


def sample_of_step(root: Path, number: int) -> list[int]:
    """The ids of a step's samples, as the run itself says when it passes over it."""
    found = run(root, "--steps", number, "--poison-step", number, "--option", "skip_poison_batch", "true")
    assert found.code == 0, found.err
    (skipped,) = events(root, "skipped")
    samples = skipped["samples"]
    assert isinstance(samples, dict)
    return list(samples["data"])


def test_a_rank_that_leaves_its_loop_early_is_named(tmp_path: Path) -> None:
    found = run(tmp_path, *QUICK, "--trouble", "leave", "--option", "max_stalled", 1, ranks=RANKS)
    assert found.code == 1
    cause = str(events(tmp_path, "failed")[0]["cause"])
    assert "hang: rank 1 " in cause, cause
    assert "in the end, after its loop" in cause, cause


def test_a_rank_at_work_that_others_wait_for_is_no_hang(tmp_path: Path) -> None:
    found = run(tmp_path, *QUICK, "--steps", 5, "--body-s", 4, ranks=RANKS)
    assert found.code == 0, found.err
    assert events(tmp_path, "failed") == []


@pytest.mark.parametrize("restored", [0, 100])
def test_a_generations_first_step_has_ten_times_as_long_wherever_it_begins(restored: int) -> None:
    page = Page.shared()
    page.begin(1, restored)
    page.restored, page.at, page.phase = restored, restored + 1, Phase.FORWARD
    dog = Watchdog(page, 0, 60.0, patient=False)
    dog._excused = 0.0
    page.marked_ns -= 100 * 10**9
    assert not dog.is_silent()
    page.step = restored + 1
    assert dog.is_silent()
    dog.close()


def test_a_rank_that_hangs_behind_its_last_update_is_blamed_and_not_one_that_waits_in_the_end() -> None:
    page = Page.shared()
    page.begin(0, 0)
    page.at = 5
    page.finished(5)
    dog = Watchdog(page, 0, 60.0, patient=False)
    hangs = dog.report(os.getpid())
    page.at = 0
    page.mark(Phase.END)
    waits: Report = replace(dog.report(os.getpid()), rank=1)
    assert blamed([hangs, waits]) == [hangs]
    assert " has been in the end, after its loop for " in waits.place
    dog.close()
