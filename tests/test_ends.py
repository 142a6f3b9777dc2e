"""What is saved when a run is ended, and what becomes of checkpoints that come too early."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.checkpoint.adopt import adopt
from dtrain.checkpoint.sources import open_source
from tests.jobs import children
from tests.saving import commits, warnings
from tests.scripts import Program, run, started


@pytest.mark.parametrize("ranks", [0, 2])
def test_sigterm_commits_the_newest_snapshot_and_the_next_start_goes_on_from_there(tmp_path: Path, ranks: int) -> None:
    often = ("--save-every", 10_000, "--snapshot-every", 1)
    with started(tmp_path, "--steps", 10_000, "--step-s", 0.01, *often, ranks=ranks) as program:
        program.wait_for(lambda: program.steps() >= 10)
        os.kill(program.pid, signal.SIGTERM)
        ended = program.end()
        done = program.steps()
    if not ranks:
        assert ended.code == 143, ended.err
    (saved,) = commits(tmp_path)
    assert done - 1 <= saved <= done + 1, "it was ended in the middle of a step"
    after = run(tmp_path, "--steps", saved + 2, *often, ranks=ranks)
    assert after.code == 0, after.err
    assert f"restored step {saved}" in after.err
    assert [line.split()[1] for line in after.out.splitlines()] == [str(saved + 1), str(saved + 2)]


@pytest.mark.parametrize("early", ["skip", "wait"])
def test_a_checkpoint_that_is_due_during_another_is_skipped_or_waited_for(tmp_path: Path, early: str) -> None:
    options = ("--option", "early_save", early, "--option", "keep_last", 100)
    with started(tmp_path, "--steps", 60, "--save-every", 1, "--step-s", 0.02, *options) as program:
        program.wait_for(lambda: commits(tmp_path))
        saver = saver_of(program)
        os.kill(saver, signal.SIGSTOP)
        try:
            stopped_at = program.steps()
            if early == "skip":
                program.wait_for(lambda: program.steps() >= stopped_at + 5)
        finally:
            os.kill(saver, signal.SIGCONT)
        assert program.end().code == 0
    if early == "wait":
        assert commits(tmp_path) == list(range(1, 61))
    else:
        found = commits(tmp_path)
        assert found[-1] == 60, "the end is always saved"
        (said,) = [text for text in warnings(tmp_path) if "checkpoints were not made" in text]
        skipped = int(said.split()[0])
        # One that was skipped at the last step is made up for by the one at the end.
        assert skipped >= 3
        assert 60 - len(found) in (skipped, skipped - 1)


def saver_of(program: Program) -> int:
    """Process id of the only rank's saver."""
    (found,) = [pid for pid in children(program.pid) if Path(f"/proc/{pid}/comm").read_text() == "dtrain-saver\n"]
    return found


def test_the_best_by_a_metric_is_kept_beside_the_last(tmp_path: Path) -> None:
    options = ("--option", "keep_last", 2, "--option", "keep_best", "distance")
    assert run(tmp_path, "--steps", 8, "--best-step", 3, *options).code == 0
    assert commits(tmp_path) == [3, 7, 8]


def test_a_metric_that_keep_best_goes_by_has_to_be_given(tmp_path: Path) -> None:
    ended = run(tmp_path, "--best-step", 3, "--option", "keep_best", "val/loss")
    assert ended.code == 1
    assert "save(metrics={'distance': 2.0}): keep_best goes by 'val/loss', which is not among them" in ended.err
    assert commits(tmp_path) == []


def test_a_run_begins_with_imported_weights_and_an_optimizer_of_its_own(tmp_path: Path) -> None:
    model = nn.Linear(8, 1)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(model.bias, -1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    adopt(open_source(tmp_path / "weights.pt", name="model"), tmp_path / "run")
    ended = run(tmp_path / "run", "--steps", 1, "--samples", 8)
    assert ended.code == 0, ended.err
    assert "restored step 0" in ended.err
    samples = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    loss = model(samples).square().mean().item()
    assert float(ended.out.split()[2]) == pytest.approx(loss, rel=1e-5)
