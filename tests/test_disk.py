"""Disks that are full or can't be written to: real ones, small file systems in memory that are mounted for a test."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.errors import ConfigError, SaveError
from dtrain.storage.local import LocalStorage
from tests.saving import Kept, Saver, bits, commits, restore
from tests.scripts import run
from tests.world import in_world

MIB = 1 << 20


def mount(*options: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", *options], stderr=subprocess.DEVNULL).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-o", "size=4m", "tmpfs", str(place)):
        # A full disk can't be had otherwise without filling a real one.
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Write a file that takes all the space there is."""
    filler = disk / "filler"
    left = os.statvfs(disk)
    filler.write_bytes(bytes(left.f_bavail * left.f_frsize - leave))
    return filler


def mebibyte(step: int) -> torch.Tensor:
    return torch.randn(MIB // 4, generator=torch.Generator().manual_seed(step))


def test_a_disk_that_fills_up_in_the_middle_of_a_save_fails_it_on_all_ranks_and_nothing_else(disk: Path) -> None:
    def work(rank: int) -> str:
        saver = Saver(disk, keep_last=2, kept=(kept := Kept()))
        for step in (1, 2):
            kept.value = mebibyte(step)
            saver.save(step)
        kept.value = [mebibyte(step) for step in (3, 4)]  # a file is begun, but there is no place for its end
        with pytest.raises(SaveError) as found:
            saver.save(3)
        torch.distributed.barrier()
        assert commits(disk) == [1, 2]
        assert sorted(path.name[:13] for path in (disk / CHECKPOINTS).iterdir()) == ["step-00000001", "step-00000002"]
        assert restore(disk, kept=(again := Kept())) == 2
        assert bits(again.value) == bits(mebibyte(2))
        return str(found.value)

    for message in in_world(2, work):
        assert message.startswith(f"step 3 could not be saved in {disk}: rank ")
        assert message.endswith("[Errno 28] No space left on device")


def test_the_same_generation_saves_again_when_there_is_space(disk: Path) -> None:
    def work(rank: int) -> list[str]:
        saver = Saver(disk, kept=Kept([mebibyte(1), mebibyte(2)]))
        saver.save(1)
        failed = []
        for step in (2, 3):
            try:
                saver.save(step)
            except SaveError as error:
                failed.append(f"{step}: {error}")
            torch.distributed.barrier()
            if rank == 0:
                subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            torch.distributed.barrier()
        return failed

    for failed in in_world(2, work):
        assert [line[:3] for line in failed] == ["2: "]
    assert commits(disk) == [1, 3]


def test_a_run_on_a_full_disk_stops_with_the_reason_and_goes_on_when_there_is_space(disk: Path) -> None:
    width = ("--width", 20_000)
    assert run(disk, "--steps", 2, *width).code == 0
    filler = fill(disk, leave=100_000)  # enough for the log, too little for a checkpoint
    found = run(disk, "--steps", 6, *width)
    assert found.code == 1
    why = f"SaveError: step 6 could not be saved in {disk}: rank 0: [Errno 28] No space left on device"
    assert [line for line in found.said if line.startswith("stopped: ") and why in line], found.err
    assert commits(disk) == [2]
    filler.unlink()
    found = run(disk, "--steps", 6, *width)
    assert found.code == 0, found.err
    assert [line.split()[1] for line in found.out.splitlines()] == ["3", "4", "5", "6"]
    assert commits(disk) == [2, 4, 6]


def test_a_disk_without_a_single_byte_left_ends_a_run_with_the_reason(disk: Path) -> None:
    """Then the events can't be written either, and they decide nothing."""
    assert run(disk, "--steps", 2).code == 0
    filler = fill(disk)
    found = run(disk, "--steps", 4)
    assert found.code == 1
    stopped = [line for line in found.said if line.startswith("stopped: ")]
    assert stopped, found.err
    assert "No space left on device" in stopped[0]
    filler.unlink()
    assert run(disk, "--steps", 4).code == 0
    assert commits(disk) == [2, 4]


def test_a_folder_that_can_only_be_read_is_refused_with_a_remedy(disk: Path) -> None:
    (disk / "run").mkdir()
    assert mount("-o", "remount,ro", "tmpfs", str(disk))
    with pytest.raises(ConfigError) as found:
        LocalStorage(str(disk / "run")).prepare()
    assert str(found.value) == (
        f"{disk}/run can't be written to (Read-only file system); choose another folder or mend its permissions"
    )
    stopped = run(disk / "run")
    assert stopped.code == 1
    assert sum(str(found.value) in line for line in stopped.said) >= 1


def test_a_user_without_the_permission_to_write_is_refused_with_a_remedy(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)

    def work(rank: int) -> str:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(ConfigError) as found:
            LocalStorage(str(tmp_path / "run")).prepare()
        return str(found.value)

    if os.geteuid() != 0:
        # Nobody else may change the user, and for the user who owns the folder it is not forbidden.
        pytest.skip("only root can become a user without permissions")
    (message,) = in_world(1, work)
    assert message == (
        f"{tmp_path}/run can't be written to (Permission denied); choose another folder or mend its permissions"
    )


@pytest.mark.parametrize("shift", [0, 1, 64])
def test_what_is_written_past_the_page_cache_is_the_same_from_any_place_in_memory(tmp_path: Path, shift: int) -> None:
    """A disk may take whole pages from whole pages alone; what is left of them is copied."""
    storage = LocalStorage(str(tmp_path))
    memory = memoryview(mmap.mmap(-1, 9 << 20))
    memory[:] = random.Random(1).randbytes(len(memory))
    parts = [memory[shift : shift + (3 << 20)], memory[:100], memory[4096 : 4096 + (2 << 20) + 5], memory[-(2 << 20) :]]
    with storage.open_new("file") as sink:
        for part in parts:
            sink.write(part)
    assert (tmp_path / "file").read_bytes() == b"".join(map(bytes, parts))
