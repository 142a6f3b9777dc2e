"""Checkpoints on a local disk beside those in a bucket: the nearest one that is whole is restored, and never one of
another run, or of a time that the run has left behind."""

from __future__ import annotations

import json
import random
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.schedule import Action, Schedule
from dtrain.config import Config, Interval
from dtrain.errors import ConfigError, NoGoodCheckpoint
from dtrain.observe.events import EVENTS, read_lines
from dtrain.storage.local import LocalStorage
from dtrain.storage.places import storage_at
from tests import evidence, kills
from tests.conftest import STEPS, Undisturbed
from tests.jobs import start
from tests.places import Place
from tests.s3_server import BUCKET, Server
from tests.train_job import Options
from tests.training import train
from tests.world import alone, in_world


def folders(tmp_path: Path) -> tuple[str, Path]:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path / "local"


def trained(root: str, local: Path, steps: int, save_every: int = 6, local_save_every: int = 2) -> dict[str, Any]:
    return train(root, steps, save_every=save_every, local_save_every=local_save_every, local_dir=str(local))


def steps_of(place: str | Path) -> list[int]:
    """Of the commits that are kept. Without dtrain's own client, which would be no good for later forks."""
    return sorted(int(attempt[5:13]) for attempt in evidence.committed(Place(str(place))))


def restored(local: Path) -> list[tuple[int, str]]:
    """The step and the place of each restore."""
    return [(line["step"], line["place"]) for line in read_lines(local / EVENTS) if line["event"] == "restored"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def fails_at(step: int) -> Callable[[Any, Any], None]:
    def fail(run: Any, now: Any) -> None:
        if now.number == step:
            raise ZeroDivisionError

    return fail


def damage(local: Path, step: int) -> None:
    (shard,) = (local / CHECKPOINTS).glob(f"step-{step:08d}.*/__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)


def test_of_two_of_the_same_step_the_local_one_is_restored(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def work() -> None:
        trained(root, local, 8)  # the end of a run goes to the bucket
        assert (steps_of(root), steps_of(local)) == ([6, 8], [2, 4, 8])
        trained(root, local, 9)
        assert restored(local)[-1] == (8, "local")

    alone(work)


def test_after_a_crash_the_local_one_is_nearer_and_the_bits_are_the_same(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def crash() -> None:
        with pytest.raises(ZeroDivisionError):
            train(
                root,
                20,
                save_every=6,
                local_save_every=2,
                local_dir=str(local),
                seen=fails_at(11),
            )

    alone(crash)
    assert (steps_of(root), steps_of(local)) == ([6], [4, 8, 10])
    alone(lambda: trained(root, local, 12))
    assert restored(local)[-1] == (10, "local")
    assert same(alone(lambda: trained(root, local, 12)), alone(lambda: train(tmp_path / "calm", 12)))


def test_a_damaged_local_one_is_passed_over_and_so_are_all_when_the_disk_is_new(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def crash(at: int) -> None:
        with pytest.raises(ZeroDivisionError):
            train(
                root,
                40,
                save_every=6,
                local_save_every=2,
                local_dir=str(local),
                seen=fails_at(at),
            )

    alone(lambda: crash(11))
    damage(local, 10)
    alone(lambda: crash(13))
    assert restored(local)[-1] == (8, "local")
    shutil.rmtree(local)
    alone(lambda: crash(14))
    assert restored(local)[-1] == (12, "storage")


def test_a_local_one_does_not_count_after_another_group_has_committed(tmp_path: Path, s3: Server) -> None:
    """The machine was away, and the run went on without it."""
    root, local = folders(tmp_path)
    alone(lambda: trained(root, local, 4, save_every=3))
    assert (steps_of(root), steps_of(local)) == ([3, 4], [2, 4])
    storage = storage_at(local)
    log = Log(storage)
    log.refresh()
    commit = log.commits()[-1]
    assert commit.group == 1
    elsewhere = tmp_path / "elsewhere"
    alone(lambda: trained(root, elsewhere, 5, save_every=100, local_save_every=100))
    assert steps_of(root)[-1] == 5

    def newer_but_left_behind() -> None:
        """As if step 7 had been saved here, before the other group came."""
        found = Log(storage)
        found.refresh()
        claim = found.claim(time.time(), "x")
        data = json.loads((local / "log" / f"{commit.number:08d}.json").read_text())["entry"]
        found.append(Entry(**(data | {"step": 7, "epoch": claim.epoch})))

    newer_but_left_behind()
    alone(lambda: trained(root, local, 6))
    assert restored(local)[-1] == (5, "storage")


def test_a_folder_of_another_run_is_refused(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)
    other, _ = folders(tmp_path)
    alone(lambda: trained(root, local, 2))

    def work() -> None:
        with pytest.raises(ConfigError, match="holds the checkpoints of another run than"):
            trained(other, local, 2)

    alone(work)


def test_nothing_good_in_both_places_is_an_error(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)
    alone(lambda: trained(root, local, 4, save_every=3))
    damage(local, 2)
    damage(local, 4)
    storage = storage_at(root)

    def work() -> None:
        for name in storage.names(CHECKPOINTS):
            storage.remove(f"{CHECKPOINTS}/{name}")
        with pytest.raises(NoGoodCheckpoint):
            trained(root, local, 6)

    alone(work)


def test_bad_ones_here_and_none_there_is_an_error_too(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def crash() -> None:
        with pytest.raises(ZeroDivisionError):
            train(root, 9, save_every=100, local_save_every=2, local_dir=str(local), seen=fails_at(5))

    alone(crash)
    assert (steps_of(root), steps_of(local)) == ([], [2, 4])
    for step in (2, 4):
        damage(local, step)

    def work() -> None:
        with pytest.raises(NoGoodCheckpoint):
            trained(root, local, 9)

    alone(work)


def test_a_full_local_disk_is_no_hindrance(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def work() -> dict[str, torch.Tensor]:
        def full(*_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device")

        with mock.patch.object(LocalStorage, "open_new", full):
            return train(root, 6, save_every=3, local_save_every=2, local_dir=str(local))

    assert same(alone(work), alone(lambda: train(tmp_path / "calm", 6)))
    assert (steps_of(root), steps_of(local)) == ([3, 6], [])
    warned = [line["message"] for line in read_lines(local / EVENTS) if line["event"] == "warning"]
    assert f"step 2 could not be saved in {local}: rank 0: [Errno 28] No space left on device" in warned


def test_a_local_disk_that_is_full_at_a_restart_is_no_hindrance(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def again() -> dict[str, torch.Tensor]:
        def full(self: LocalStorage, *_: Any) -> Any:
            raise OSError(28, "No space left on device")

        with mock.patch.object(LocalStorage, "create", full):
            return trained(root, local, 12)

    alone(lambda: trained(root, local, 6))
    assert same(alone(again), alone(lambda: train(tmp_path / "calm", 12)))
    assert (steps_of(root)[-1], steps_of(local)[-1]) == (12, 4)
    warned = [line["message"] for line in read_lines(local / EVENTS) if line["event"] == "warning"]
    assert f"{local} can't be claimed: [Errno 28] No space left on device" in warned
    assert f"step 8 could not be saved in {local}: it can't be claimed" in warned


def test_a_local_disk_that_can_only_be_read_at_a_restart_is_no_hindrance(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def again() -> dict[str, torch.Tensor]:
        def failing(self: LocalStorage, *_: Any, **__: Any) -> Any:
            raise OSError(30, "Read-only file system")

        with (
            mock.patch.object(LocalStorage, "create", failing),
            mock.patch.object(LocalStorage, "open_new", failing),
            mock.patch.object(LocalStorage, "prepare", refuse),
        ):
            return trained(root, local, 12)

    def refuse(self: LocalStorage) -> None:
        raise ConfigError(f"{self.root} can't be written to (Read-only file system)")

    alone(lambda: trained(root, local, 4, save_every=3))
    damage(local, 4)  # which can't be written down
    assert same(alone(again), alone(lambda: train(tmp_path / "calm", 12)))
    assert (restored(local)[-1], steps_of(root)[-1]) == ((4, "storage"), 12)
    warned = [line["message"] for line in read_lines(local / EVENTS) if line["event"] == "warning"]
    assert f"{local} can't be claimed: [Errno 30] Read-only file system" in warned


def test_a_local_disk_that_can_not_be_read_at_a_restart_is_no_hindrance(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def again() -> dict[str, torch.Tensor]:
        names = LocalStorage.names

        def failing(self: LocalStorage, folder: str, after: str = "") -> list[str]:
            if folder == FOLDER:
                raise OSError(5, "Input/output error")
            return names(self, folder, after)

        with mock.patch.object(LocalStorage, "names", failing):
            return trained(root, local, 12)

    alone(lambda: trained(root, local, 6))
    assert same(alone(again), alone(lambda: train(tmp_path / "calm", 12)))
    assert (restored(local)[-1], steps_of(root)[-1]) == ((6, "storage"), 12)


def test_all_ranks_have_to_see_the_folder(tmp_path: Path, s3: Server) -> None:
    root, local = folders(tmp_path)

    def work(rank: int) -> None:
        with pytest.raises(ConfigError, match="is not the folder that rank 0 sees"):
            trained(root, local if rank == 0 else tmp_path / f"of-{rank}", 2)

    in_world(2, work)


def test_all_nodes_have_to_share_the_disk(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(ConfigError, match=r"is not the folder that rank 0 sees\. All ranks must reach the same"):
            train(tmp_path / str(rank), 2)

    in_world(2, work)


@pytest.mark.parametrize("every", ["auto", 0, "often"])
def test_an_interval_that_can_not_be_right_is_named(every: Any) -> None:
    with pytest.raises(ConfigError, match="local_save_every="):
        Config(dir="s3://b/x", global_batch=1, micro_batch=1, local_save_every=every)


def test_on_a_disk_there_is_no_second_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local_save_every=5 is for a dir that is a URL"):
        Config(dir=str(tmp_path), global_batch=1, micro_batch=1, local_save_every=5)


def test_a_local_one_never_waits_for_an_upload() -> None:
    plan = Schedule(
        Interval.parse(10),
        Interval.parse(1000, "snapshot_every"),
        lambda step: 0,
        mtbf_s=1,
        local_save_every=Interval.parse(3),
    )
    found = []
    for step in range(1, 21):
        action = plan.due(step, busy=11 <= step <= 16)
        if action in (Action.SAVE, Action.LOCAL_SAVE):
            plan.saved(local=action is Action.LOCAL_SAVE)
            found.append((step, action.name))
    assert found == [
        (3, "LOCAL_SAVE"),
        (6, "LOCAL_SAVE"),
        (9, "LOCAL_SAVE"),
        (10, "SAVE"),
        (17, "LOCAL_SAVE"),  # that of step 12
        (18, "LOCAL_SAVE"),
        (20, "SAVE"),
    ]


def test_kills_change_no_bit(tmp_path: Path, s3: Server, undisturbed: Undisturbed) -> None:
    url, local = folders(tmp_path)
    options = Options(
        run=url, local=str(local), local_save_every=2, save_every=12, evidence=str(tmp_path / "evidence"), steps=STEPS
    )
    dice = random.Random(31)
    for _ in range(2):
        with start(options, 2) as job:
            kills.trainers(job, dice)
            kills.a_saver(job, dice, 0)
            kills.trainers(job, dice, 2)
            job.until_new_steps(3)
            job.kill_all()
    with start(options, 2) as job:
        assert job.wait() == 0, job.tail()
    evidence.assert_same(evidence.of_run(options), undisturbed(2))
    assert any(place == "local" for _, place in restored(local))
