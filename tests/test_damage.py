"""Damaged checkpoints: whatever byte is wrong, it is named and the commit before is taken; never a wrong tensor."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.checkpoint import load
from dtrain.checkpoint.format import MANIFEST, METADATA, VERSION, Manifest, digest
from dtrain.checkpoint.log import Entry
from dtrain.checkpoint.sources import open_source
from dtrain.errors import Damaged, NoGoodCheckpoint, StateError
from tests.saving import Saver, bad, bits, commits, differences, folder_of, log_of, warnings
from tests.steps_of_a_run import contents, flip, make, objects, restored, spoil
from tests.world import alone, errors, in_world
from tests.written import write_tree


def test_a_flipped_byte_anywhere_is_detected_or_lies_where_nothing_is_read(tmp_path: Path) -> None:
    """Hundreds of places over all files, one at a time; the group that restores is the same all the time."""
    make(tmp_path / "run", [10, 20], ranks=2)
    newest = folder_of(tmp_path / "run", 20)
    names = sorted(path.name for path in newest.iterdir())
    assert names == [METADATA, "__0_0.distcp", "__1_0.distcp", MANIFEST]
    manifest = Manifest.from_json((newest / MANIFEST).read_bytes())
    items = [chunk for item in manifest.tensors.values() for chunk in item.chunks]
    pick = random.Random(7)
    places = [(name, pick.randrange((newest / name).stat().st_size)) for name in names for _ in range(90)]

    def work() -> list[str]:
        wrong = []
        for name, place in places:
            root = tmp_path / "flipped"
            shutil.copytree(tmp_path / "run", root)
            path = root / newest.relative_to(tmp_path / "run") / name
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << pick.randrange(8)
            path.write_bytes(data)
            is_read = name == MANIFEST or any(
                item.file == name and item.offset <= place < item.offset + item.length for item in items
            )
            step = restored(root)
            told = [name in entry.reason for entry in bad(root)]
            named = [name in line and "step 20 is damaged and passed over" in line for line in warnings(root)]
            if (step, told, named) != ((10, [True], [True]) if is_read else (20, [], [])):
                wrong.append(f"{name} at {place}: {step} {bad(root)} {warnings(root)}")
            shutil.rmtree(root)
        return wrong

    assert alone(work, timeout_s=120) == []


def _truncate(folder: Path) -> str:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return "__0_0.distcp has"


def _lengthen(folder: Path) -> str:
    with (folder / "__1_0.distcp").open("ab") as file:
        file.write(b"\0")
    return "__1_0.distcp has"


def _lose(folder: Path) -> str:
    (folder / "__1_0.distcp").unlink()
    return "__1_0.distcp"


def _lose_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return MANIFEST


def _lose_metadata(folder: Path) -> str:
    (folder / METADATA).unlink()
    return METADATA


def _lose_all(folder: Path) -> str:
    shutil.rmtree(folder)
    return MANIFEST


def _swap_shards(folder: Path) -> str:
    one, other = folder / "__0_0.distcp", folder / "__1_0.distcp"
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1])
    other.write_bytes(data[0])
    return "distcp"


def _take_the_manifest_of_another_step(folder: Path) -> str:
    shutil.copy(next(folder.parent.glob("step-00000010*")) / MANIFEST, folder / MANIFEST)
    return f"{MANIFEST} is not the one that was committed"


def _take_a_shard_of_another_step(folder: Path) -> str:
    shutil.copy(next(folder.parent.glob("step-00000010*")) / "__1_0.distcp", folder / "__1_0.distcp")
    return "__1_0.distcp"


@pytest.mark.parametrize(
    "damage",
    [
        *(_truncate, _lengthen, _lose, _lose_manifest, _lose_metadata, _lose_all),
        *(_swap_shards, _take_the_manifest_of_another_step, _take_a_shard_of_another_step),
    ],
)
def test_a_damaged_folder_is_named_and_the_commit_before_is_taken_by_all(
    tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    make(tmp_path, [10, 20], ranks=2)
    named = damage(folder_of(tmp_path, 20))
    assert in_world(2, lambda rank: restored(tmp_path)) == [10, 10]
    (entry,) = bad(tmp_path)
    assert (entry.step, named in entry.reason) == (20, True), entry
    (warning,) = warnings(tmp_path)
    assert warning.startswith("checkpoint of step 20 is damaged and passed over: ")
    assert named in warning
    assert in_world(2, lambda rank: restored(tmp_path)) == [10, 10]
    assert len(bad(tmp_path)) == 1, "it is recorded once"


def test_several_damaged_checkpoints_are_passed_over_one_after_the_other(tmp_path: Path) -> None:
    make(tmp_path, [10, 20, 30, 40])
    for step in (40, 30):
        spoil(tmp_path, step)
    (folder_of(tmp_path, 20) / MANIFEST).unlink()
    assert in_world(3, lambda rank: restored(tmp_path)) == [10] * 3
    assert [entry.step for entry in bad(tmp_path)] == [40, 30, 20]
    assert commits(tmp_path) == [10]


def test_a_run_that_went_back_commits_its_steps_again_and_they_count(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    spoil(tmp_path, 20)
    assert alone(lambda: restored(tmp_path)) == 10
    make(tmp_path, [20])
    assert alone(lambda: restored(tmp_path)) == 20
    assert commits(tmp_path) == [10, 20]


def test_a_run_without_any_good_checkpoint_stops_and_never_begins_at_step_0(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    for step in (10, 20):
        spoil(tmp_path, step)
    for ranks in (2, 1):  # also when all of them are known to be bad from the start
        for error in errors(ranks, lambda rank: restored(tmp_path)):
            assert isinstance(error, NoGoodCheckpoint)
            assert str(error).startswith(f"{tmp_path} has commits, but none of them can be read:\n  step 20: rank 0:")
            assert "\n  step 10: rank 0:" in str(error)
            assert str(error).endswith("Bring the files back, or start in another run folder.")


def test_files_that_were_away_count_again_when_they_are_back(tmp_path: Path) -> None:
    make(tmp_path / "run", [10, 20])
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    for _ in range(2):
        (error,) = errors(1, lambda rank: restored(tmp_path / "run"))
        assert isinstance(error, NoGoodCheckpoint)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "run" / "checkpoints")
    assert open_source(tmp_path / "run").manifest.step == 20
    assert alone(lambda: restored(tmp_path / "run")) == 20
    assert [entry.step for entry in bad(tmp_path / "run")] == [20, 10]
    assert commits(tmp_path / "run") == [20], "what was restored whole counts like any other"
    assert alone(lambda: restored(tmp_path / "run")) == 20
    kinds = [entry.kind for entry in log_of(tmp_path / "run").entries if entry.kind != "claim"]
    assert kinds == ["commit", "commit", "bad", "bad", "good"]


def test_files_that_are_back_are_read_by_everybody_as_by_the_run(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (error,) = errors(1, lambda rank: restored(tmp_path))
    assert isinstance(error, NoGoodCheckpoint)
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (tmp_path / "away").rename(tmp_path / "checkpoints")

    def loaded(**asked: Any) -> tuple[int, bool]:
        model = nn.Linear(5, 3)
        step = load(tmp_path, {"model": model}, **asked).step
        return step, bits(model.weight) == bits(objects(step)["model"].weight)

    assert in_world(2, lambda rank: loaded()) == [(20, True)] * 2
    assert in_world(2, lambda rank: loaded(step=10)) == [(10, True)] * 2
    assert open_source(folder_of(tmp_path, 10)).manifest.step == 10
    make(tmp_path, [10])  # then there is a good one
    first = next(entry for entry in log_of(tmp_path).entries if entry.kind == "commit")
    with pytest.raises(NoGoodCheckpoint, match=f"{first.attempt} failed its check: "):
        open_source(tmp_path / "checkpoints" / first.attempt)


def test_what_was_found_bad_twice_with_a_restore_in_between_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    for step, other in ((20, 10), (10, 20)):
        folder_of(tmp_path, step).rename(tmp_path / "away")
        assert alone(lambda: restored(tmp_path)) == other
        (tmp_path / "away").rename(folder_of(tmp_path, step))
    assert commits(tmp_path) == [20]
    spoil(tmp_path, 20)
    assert alone(lambda: restored(tmp_path)) == 10
    assert commits(tmp_path) == [10]
    assert [entry.step for entry in bad(tmp_path)] == [20, 10, 20]


def test_checkpoints_whose_log_is_lost_are_neither_passed_over_nor_deleted(tmp_path: Path) -> None:
    make(tmp_path / "run", [10, 20])
    (tmp_path / "run" / "log").rename(tmp_path / "log")
    for _ in range(2):
        (error,) = errors(1, lambda rank: restored(tmp_path / "run"))
        assert isinstance(error, NoGoodCheckpoint)
        assert f"{tmp_path}/run/log, which tells what of it is whole, is empty or gone; bring it back" in str(error)
    shutil.rmtree(tmp_path / "run" / "log", ignore_errors=True)
    (tmp_path / "log").rename(tmp_path / "run" / "log")
    assert alone(lambda: restored(tmp_path / "run")) == 20


def test_a_run_whose_only_commit_entry_is_broken_stops_and_its_checkpoint_stays(tmp_path: Path) -> None:
    make(tmp_path, [10])
    folder = folder_of(tmp_path, 10)
    path = tmp_path / "log" / "00000001.json"
    whole = path.read_bytes()
    flip(path, 60)
    (error,) = errors(1, lambda rank: restored(tmp_path))
    assert isinstance(error, NoGoodCheckpoint)
    assert "log/00000001.json: no log entry" in str(error)
    assert folder.is_dir(), "what may have been committed is not taken for a leftover"
    path.write_bytes(whole)
    assert alone(lambda: restored(tmp_path)) == 10


def test_a_mismatch_that_one_rank_alone_sees_is_agreed_on_by_all(tmp_path: Path) -> None:
    make(tmp_path, [10, 20], ranks=2)
    folder = folder_of(tmp_path, 20)

    def work(rank: int) -> int | None:
        held = objects(999)
        saver = Saver(tmp_path, **held)
        storage = saver.manager._storages[0]
        read_into = storage.read_into

        def own_disk(path: str, offset: int, buffers: Any) -> None:
            read_into(path, offset, buffers)
            if rank == 1 and path.startswith(f"checkpoints/{folder.name}/"):
                buffers[-1][:1] = bytes([buffers[-1][0] ^ 1]) if buffers[-1].nbytes else b""

        storage.read_into = own_disk  # type: ignore[method-assign]  # a cable that flips a bit, on one machine alone
        found = saver.restore()
        assert list(differences(contents(objects(10)), contents(held))) == []
        return None if found is None else found.step

    assert in_world(3, work) == [10] * 3
    (entry,) = bad(tmp_path)
    assert entry.reason.startswith(f"rank 1: checkpoints/{folder.name}/__")


def _with_manifest(root: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Commit the newest checkpoint again with another manifest, its digest being right."""
    folder = folder_of(root, step)
    fields = json.loads((folder / MANIFEST).read_bytes())
    change(fields)
    data = json.dumps(fields).encode()

    def commit() -> None:
        saver = Saver(root)
        (folder / MANIFEST).write_bytes(data)
        saver.catalog.log.append(
            Entry(
                kind="commit",
                epoch=saver.manager.epoch,
                time=0.0,
                step=step,
                attempt=folder.name,
                manifest=digest(data),
            )
        )

    alone(commit)


def test_any_change_of_the_manifest_of_a_copy_is_detected(tmp_path: Path) -> None:
    """No run's log has a digest of it."""
    state = {"cut": torch.arange(8.0).reshape(4, 2), "lr": 0.001}
    copy = alone(lambda: write_tree(tmp_path / "run", state)).rename(tmp_path / "copy")
    data = (copy / MANIFEST).read_bytes()
    for place in {*range(0, len(data), 9), *range(len(data) - 60, len(data))}:
        broken = bytearray(data)
        broken[place] ^= 1 << place % 7
        (copy / MANIFEST).write_bytes(broken)
        with pytest.raises((Damaged, StateError), match="manifest"):
            open_source(copy)
    edited = data.replace(b'"lr":0.001', b'"lr":0.009')
    assert edited != data
    for written in (edited + b"\n", json.dumps(json.loads(edited)).encode(), json.dumps(json.loads(data)).encode()):
        (copy / MANIFEST).write_bytes(written)
        with pytest.raises(Damaged, match="not those that its own digest was made of"):
            open_source(copy)
    earlier = data[: data.rindex(b',"digest"')] + b"}"
    (copy / MANIFEST).write_bytes(earlier)
    assert open_source(copy).manifest == Manifest.from_json(data)
    with pytest.raises(Damaged, match="no manifest that can be read"):
        Manifest.from_json(json.dumps(json.loads(data) | {"files": []}).encode())


def test_a_manifest_of_a_newer_version_is_refused_and_the_checkpoint_stays_good(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])

    def newer(fields: dict[str, Any]) -> None:
        fields |= {"version": VERSION + 1, "what nobody knows yet": 1}

    _with_manifest(tmp_path, 20, newer)
    for error in errors(2, lambda rank: restored(tmp_path)):
        assert isinstance(error, StateError)
        assert f"version {VERSION + 1}" in str(error)
        assert "newer dtrain" in str(error)
    assert bad(tmp_path) == []


@pytest.mark.parametrize("way", ["../../outside", "/etc/hostname", "../step-00000010"])
def test_a_path_in_a_manifest_can_not_leave_its_folder(tmp_path: Path, way: str) -> None:
    root = tmp_path / "run"
    make(root, [10, 20])
    shutil.copy(folder_of(root, 20) / "__0_0.distcp", tmp_path / "outside")

    def elsewhere(fields: dict[str, Any]) -> None:
        fields["files"] = {way: fields["files"]["__0_0.distcp"]}

    _with_manifest(root, 20, elsewhere)
    assert alone(lambda: restored(root)) == 10
    assert bad(root)[0].reason.startswith(f"checkpoints/{folder_of(root, 20).name}")
    if way.startswith(".."):
        assert "leads out of the run folder" in bad(root)[0].reason


def test_a_restored_weight_has_the_bits_that_the_file_has(tmp_path: Path) -> None:
    """The whole way, by hand: the payload's place in the shard file, and the bytes that lie there."""
    make(tmp_path, [10])
    folder = folder_of(tmp_path, 10)
    chunk = Manifest.from_json((folder / MANIFEST).read_bytes()).tensors["model.weight"].chunks[0]
    start = chunk.offset + chunk.payload
    assert start % 64 == 0
    data = (folder / chunk.file).read_bytes()[start : start + 60]
    assert data == bits(objects(10)["model"].weight)
