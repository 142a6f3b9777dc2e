"""Faults of stock torch's checkpoints that show when a write fails or is cut short; dtrain has none of them.

More of them are in `test_stock_faults_plans`, `test_stock_faults_reading` and `test_stock_faults_async`.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.spec import AbstractBufferedFile
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from dtrain.checkpoint.format import MANIFEST
from dtrain.errors import SaveError
from tests.saving import Kept, commits, differences, folder_of, restore, save
from tests.stock import at_byte, filled, still, stock_load
from tests.world import Raised, alone, errors, in_world, outcomes

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def out_of_space() -> None:
    raise NO_SPACE


def newest(root: Path, value: Any) -> tuple[int | None, list[str]]:
    """The step that a new generation goes on from, and where its state differs from `value`."""
    kept = Kept()
    step = restore(root, kept=kept)
    return step, list(differences(value, kept.value))


class FullForThreads(FileSystem):
    """Every thread but the main one finds the disk full, and the main one waits until they all did."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.failed = threading.Semaphore(0)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if threading.current_thread() is not threading.main_thread():
            self.failed.release()
            raise NO_SPACE
        if Path(path).suffix == ".distcp":
            for _ in range(self.threads):
                assert self.failed.acquire(timeout=30)
        with super().create_stream(path, mode) as stream:
            yield stream


def test_a_write_that_fails_in_one_thread_is_swallowed_by_stock_and_fails_a_save_of_dtrain(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    folder, root = tmp_path / "stock", tmp_path / "run"

    def stock() -> tuple[list[str], list[str]]:
        raised: list[str] = []
        writer = dcp.FileSystemWriter(folder, thread_count=4)
        writer.fs = FullForThreads(threads=3)
        with mock.patch.object(threading, "excepthook", lambda args: raised.append(str(args.exc_value))):
            dcp.save({name: filled(1.0) for name in names}, storage_writer=writer)
        metadata = dcp.FileSystemReader(folder).read_metadata()
        return raised, [index.fqn for index in cast(dict[Any, Any], metadata.storage_data)]

    raised, saved = alone(stock)
    assert raised == [str(NO_SPACE)] * 3
    still(len(saved) == 1, "a writer thread's exception is swallowed, and the save succeeds without its tensors")

    value = {name: filled(1.0) for name in names}
    in_world(2, lambda rank: save(root, 1, kept=Kept(value)))

    def dtrain(rank: int) -> None:
        with at_byte(5000 if rank == 1 else 1 << 30, out_of_space):
            save(root, 2, kept=Kept({name: filled(2.0) for name in names}))

    for error in errors(2, dtrain):
        assert isinstance(error, SaveError)
        assert str(NO_SPACE) in str(error)
    assert commits(root) == [1]
    assert alone(lambda: newest(root, value)) == (1, [])


class Killed(FileSystem):
    """Rank 0 says when its shard is written; rank 1 waits for that, and is killed before it begins its own."""

    def __init__(self, fifo: Path, rank: int) -> None:
        self.fifo = fifo
        self.rank = rank

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if self.rank == 1:
            self.fifo.read_bytes()
            os.kill(os.getpid(), signal.SIGKILL)
        with super().create_stream(path, mode) as stream:
            yield stream
        if Path(path).suffix == ".distcp":
            self.fifo.write_bytes(b"done")


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_kill_in_a_save_mixes_two_steps_in_stock_and_leaves_the_last_commit_in_dtrain(tmp_path: Path) -> None:
    folder, root, fifo = tmp_path / "stock", tmp_path / "run", tmp_path / "fifo"
    os.mkfifo(fifo)

    def state(step: int) -> dict[str, torch.Tensor]:
        return {"a": filled(float(step)), "b": filled(float(step))}

    def stock(rank: int) -> None:
        dcp.save(state(1), checkpoint_id=str(folder))
        writer = dcp.FileSystemWriter(folder)  # overwrite=True is the default
        writer.fs = Killed(fifo, rank)
        dcp.save(state(2), storage_writer=writer)

    first, second = outcomes(2, stock)
    assert isinstance(first, Raised)
    assert second == "ended with -9"
    loaded = stock_load(folder, **state(0))
    steps = sorted(tensor.unique().item() for tensor in loaded.values())
    still(steps == [1.0, 2.0], "shards are written over in place, and a crash leaves a mix of two steps that loads")

    in_world(2, lambda rank: save(root, 1, kept=Kept(state(1))))

    whole = (folder_of(root, 1) / "__0_0.distcp").stat().st_size

    def dtrain(rank: int) -> None:
        # Rank 0 dies when all but a byte of step 2 is written, rank 1 in the middle of its tensor.
        with at_byte((whole - 1, 5000)[rank], lambda: os.kill(os.getpid(), signal.SIGKILL)):
            save(root, 2, kept=Kept(state(2)))

    assert outcomes(2, dtrain) == ["ended with -9"] * 2
    assert commits(root) == [1]
    assert in_world(2, lambda rank: newest(root, state(1))) == [(1, [])] * 2


OBJECTS: dict[str, bytes] = {}


class _Upload(AbstractBufferedFile):  # type: ignore[misc]
    """A file as fsspec has it for any object store: parts are sent, and the last of them completes the upload."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final:
            OBJECTS[self.path] = b"".join(self.parts)
        return True


class Bucket(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """An object store in memory."""

    protocol = "bucket"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _Upload:
        return _Upload(self, path, mode, block_size=1 << 16)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if (path := self._strip_protocol(path)) not in OBJECTS:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(OBJECTS[path]), "type": "file"}

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        OBJECTS[self._strip_protocol(path2)] = OBJECTS.pop(self._strip_protocol(path1))

    def _rm(self, path: str) -> None:
        del OBJECTS[self._strip_protocol(path)]


class FailsAt(dcp.DefaultSavePlanner):
    """One of the tensors can't be had."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == self.name:
            out_of_space()
        return super().resolve_data(write_item)


def test_a_failing_upload_publishes_half_an_object_in_stock_and_nothing_is_taken_of_it_in_dtrain(
    tmp_path: Path,
) -> None:
    value = {"a": filled(1.0), "b": filled(2.0)}
    root = tmp_path / "run"

    def stock(name: str) -> tuple[str, int]:
        fsspec.register_implementation("bucket", Bucket, clobber=True)
        OBJECTS.clear()
        outcome = "saved"
        try:
            dcp.save(value, storage_writer=FsspecWriter("bucket://x", sync_files=False), planner=FailsAt(name))
        except CheckpointException as error:
            outcome = str(error)
        return outcome, len(OBJECTS.get("x/__0_0.distcp", b""))

    (saved, whole), (failed, published) = alone(lambda: [stock("none"), stock("b")])
    assert saved == "saved"
    assert str(NO_SPACE) in failed
    still(0 < published < whole, "an exception while an object is streamed completes its upload, truncated")

    in_world(1, lambda rank: save(root, 1, kept=Kept(value)))
    whole_ones = [folder_of(root, 1)]

    def dtrain(limit: int) -> list[BaseException]:
        def work(rank: int) -> None:
            with at_byte(limit, out_of_space):
                save(root, 2, kept=Kept(value))

        return errors(1, work)

    for limit in (0, 100, value["a"].nbytes, 2 * value["a"].nbytes):
        (error,) = dtrain(limit)
        assert isinstance(error, SaveError)
        assert commits(root) == [1]
        assert [folder for folder in whole_ones[0].parent.iterdir() if (folder / MANIFEST).exists()] == whole_ones
    assert alone(lambda: newest(root, value)) == (1, [])


def test_stock_syncs_the_whole_host_once_a_file_and_dtrain_only_its_own_files(tmp_path: Path) -> None:
    def syncs(work: Callable[[], object]) -> int:
        with mock.patch.object(os, "sync") as sync:
            work()
            return sync.call_count

    value = {"a": filled(1.0)}
    writer = {"storage_writer": FsspecWriter("memory://faults")}  # sync_files=True is the default
    files = 2  # a shard and .metadata
    counted = alone(lambda: syncs(lambda: dcp.save(value, **writer)))
    still(counted == files, "sync_files calls os.sync() where a stream has no descriptor")
    assert alone(lambda: syncs(lambda: save(tmp_path, 1, kept=Kept(value)))) == 0
    assert commits(tmp_path) == [1]
