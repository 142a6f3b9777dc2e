"""Which checkpoints are kept, and what is cleared away when: never one that somebody may still need."""

from __future__ import annotations

from pathlib import Path

from tests.saving import Saver, commits, folder_of, log_of
from tests.steps_of_a_run import make, restored, spoil
from tests.world import alone


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
