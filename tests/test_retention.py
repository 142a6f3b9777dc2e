"""Which checkpoints are kept, and what is cleared away when: never one that somebody may still need."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.policy import Keep, to_retire
from dtrain.criteria import Best
from dtrain.errors import NoGoodCheckpoint
from dtrain.storage.local import LocalStorage
from tests.saving import Background, Saver, commits, folder_of, log_of
from tests.steps_of_a_run import make, objects, restored, spoil
from tests.world import alone, errors


def test_the_last_ones_are_kept_and_a_retire_entry_comes_before_each_removal(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30, 40, 50], keep_last=2)
    assert commits(tmp_path) == [40, 50]
    assert sorted(path.name[:13] for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000040", "step-00000050"]
    kinds = [(entry.kind, entry.step) for entry in log_of(tmp_path).entries if entry.kind != "claim"]
    assert kinds == [
        *(("commit", 10), ("commit", 20), ("commit", 30), ("retire", 10)),
        *(("commit", 40), ("retire", 20), ("commit", 50), ("retire", 30)),
    ]


def test_a_bad_one_is_no_substitute_for_a_good_one_and_goes_with_its_age(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30], keep_last=2)
    spoil(tmp_path, 30)
    assert alone(lambda: restored(tmp_path)) == 20
    make(tmp_path, [30], keep_last=2)
    assert commits(tmp_path) == [20, 30]
    assert len(list((tmp_path / "checkpoints").glob("step-00000030.*"))) == 2, "kept for whoever wants to look"
    make(tmp_path, [40, 50], keep_last=2)
    assert commits(tmp_path) == [40, 50]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def away_for_a_start(run: Path) -> None:
    (run / "checkpoints").rename(run / "away")
    (error,) = errors(1, lambda rank: restored(run))
    assert isinstance(error, NoGoodCheckpoint)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "away").rename(run / "checkpoints")


@pytest.mark.parametrize("kind", [Saver, Background])
def test_after_files_were_away_the_checkpoints_before_are_kept_until_there_are_enough_again(
    tmp_path: Path, kind: type[Saver]
) -> None:
    make(tmp_path, [30, 40, 50])
    away_for_a_start(tmp_path)
    folders = {step: folder_of(tmp_path, step) for step in (30, 40, 50)}

    def go_on(*steps: int) -> None:
        saver = kind(tmp_path, **objects(999))
        found = saver.restore()
        assert found is not None
        assert found.step == max(commits(tmp_path))
        for step in steps:
            saver.save(step)
        if isinstance(saver, Background):
            assert saver.end() == 0

    alone(lambda: go_on(60))
    assert commits(tmp_path) == [50, 60]
    assert all(folder.is_dir() for folder in folders.values())
    alone(lambda: go_on(70))
    assert commits(tmp_path) == [50, 60, 70]
    assert [step for step, folder in folders.items() if folder.is_dir()] == [50]


def test_one_that_was_found_bad_is_kept_where_it_would_be_as_a_good_one(tmp_path: Path) -> None:
    log = Log(LocalStorage(str(tmp_path)))
    log.claim(0.0, "")
    for step in (900, 1000, 1100, 1200, 1300):
        metrics = {"val": 0.0 if step == 900 else 1.0}
        log.append(Entry(kind="commit", epoch=1, time=step, step=step, attempt=f"{step}", metrics=metrics))
    for step in (900, 1000, 1100):
        log.append(Entry(kind="bad", epoch=1, time=0.0, step=step, attempt=f"{step}"))

    def retired(**rules: Any) -> list[int]:
        return [entry.step for entry in to_retire(log, Keep(last=2, **rules), 2000)]

    assert retired() == [900, 1000, 1100]
    assert retired(every=1000) == [900, 1100]
    assert retired(best=Best("val")) == [1000, 1100]
    assert retired(younger_s=950) == [900, 1000]
    log.append(Entry(kind="bad", epoch=1, time=0.0, step=1200, attempt="1200"))
    assert retired() == [], "there are not enough good ones"


def test_what_was_retired_but_not_removed_yet_is_removed_by_the_next_claim(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30])
    folder = folder_of(tmp_path, 10)

    def retire() -> None:
        Saver(tmp_path).catalog._append("retire", step=10, attempt=folder.name)  # and here the process is killed

    alone(retire)
    assert folder.is_dir()
    assert alone(lambda: restored(tmp_path)) == 30
    assert not folder.exists()
    assert folder_of(tmp_path, 20).is_dir()


def test_uncommitted_attempts_are_removed_by_the_next_claim_but_for_those_of_a_newer_epoch(tmp_path: Path) -> None:
    make(tmp_path, [10])
    epoch = log_of(tmp_path).epoch
    places = tmp_path / "checkpoints"
    theirs = f"step-00000020.e{epoch}"
    names = [f"{theirs}.0000aaaa", f"step-00000020.e{epoch + 2}.0000bbbb", "mine", f"a.e{epoch}.0000cccc", "step.eX.c"]
    names += [f"{theirs}.keep", "step-00000020.e².0000dddd", "best.v1.model", "my.v0.5"]
    for name in names:
        (places / name).mkdir()
        (places / name / "__0_0.distcp").write_bytes(b"half")
    assert alone(lambda: restored(tmp_path)) == 10
    assert [name for name in names if not (places / name).exists()] == names[:1]


def test_a_step_that_was_committed_twice_takes_one_place_of_the_last_ones(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 20, 30], keep_last=3)
    assert commits(tmp_path) == [10, 20, 30]


def test_of_a_step_that_is_kept_for_ever_the_copy_with_metrics_is_kept(tmp_path: Path) -> None:
    log = Log(LocalStorage(str(tmp_path)))
    log.claim(0.0, "")
    for step in (900, 1000, 1000, 1100, 1200, 1300):
        measured = {"val": 1.0} if log.entries[-1].step == 1000 == step else {}
        attempt = f"{step} {measured}"
        log.append(Entry(kind="commit", epoch=1, time=0.0, step=step, attempt=attempt, metrics=measured))
    retired = to_retire(log, Keep(last=2, every=1000), 0.0)
    assert [entry.attempt for entry in retired] == ["900 {}", "1000 {}", "1100 {}"]
