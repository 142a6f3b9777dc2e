"""Processes that die at the worst moments of a save: what the ranks believe afterwards is what is true."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dtrain.checkpoint.agreement import Agreement
from dtrain.checkpoint.catalog import Catalog
from dtrain.checkpoint.layout import Layout
from dtrain.checkpoint.saver import Saver as WritingSaver
from dtrain.elastic.process import fork
from dtrain.errors import SaveError
from tests.saving import Background, Kept, Saver, bad, bits, commits, folder_of, restore
from tests.world import alone, in_world


def dies_after(owner: type, name: str, marker: Path) -> None:
    """Have the process that calls a method first killed as soon as that is done."""
    real: Callable[..., Any] = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = real(self, *args, **kwargs)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    setattr(owner, name, method)


@pytest.mark.parametrize(
    ("rank", "owner", "method", "committed"),
    [
        (1, Agreement, "report", False),
        (0, Agreement, "report", False),
        (0, Agreement, "decide", False),
        (0, Catalog, "commit", True),
        (0, Agreement, "conclude", True),
        (0, WritingSaver, "save", True),
        (1, WritingSaver, "save", True),
        (0, Catalog, "retire", True),
    ],
)
def test_all_ranks_are_told_what_became_of_a_save_in_which_a_saver_died(
    tmp_path: Path, rank: int, owner: type, method: str, committed: bool
) -> None:
    def work(mine: int) -> tuple[str, int, list[int]]:
        if mine == rank:
            dies_after(owner, method, tmp_path / "died")
        saver = Background(tmp_path / "run", kept=Kept({"a": torch.arange(10.0), "b": torch.arange(20.0)}))
        saver.begin(1)
        if mine == rank:
            saver.process.wait()
            saver.process = saver._fork()
        try:
            saver.manager.wait()
            told = "committed"
        except SaveError as error:
            told = str(error)
        found = told, saver.slots.board.committed, commits(tmp_path / "run")
        dist.barrier()
        saver.save(2)
        dist.barrier()
        assert commits(tmp_path / "run")[-1] == 2
        assert saver.end() == 0
        return found

    ranks = in_world(2, work)
    log = ranks[0][2]
    # A follower's saver that dies after its report may still be counted in: then all are told so.
    assert (log == [1]) == committed or (rank, method) == (1, "report")
    for told, believed, _ in ranks:
        assert (told == "committed", believed) == ((True, 1) if log else (False, 0)), told
        if not log:
            assert f"the saver of rank {rank} died while it saved" in told


def test_a_saver_that_was_replaced_between_two_requests_can_still_mark_a_checkpoint_as_bad(tmp_path: Path) -> None:
    def work() -> int | None:
        kept = Kept({"a": torch.zeros(100_000)})
        saver = Saver(tmp_path, kept=kept)
        saver.save(1)
        saver.save(2)
        shard = next(folder_of(tmp_path, 2).glob("__0*"))
        data = bytearray(shard.read_bytes())
        data[5000] ^= 1
        shard.write_bytes(data)
        background = Background(tmp_path, kept=kept)
        background.replace()  # it has claimed the run
        restored = background.restore()
        assert background.end() == 0
        return restored.step if restored else None

    assert alone(work) == 1
    assert [entry.step for entry in bad(tmp_path)] == [2]


def test_a_type_that_changed_from_one_save_to_the_next_is_that_of_the_second(tmp_path: Path) -> None:
    """Of types of one size, which take the same room in the file."""

    def work(rank: int) -> torch.Tensor:
        kept = Kept({"a": torch.arange(10, dtype=torch.int32)})
        saver = Saver(tmp_path, kept=kept)
        saver.save(1)
        kept.value = {"a": torch.arange(10, dtype=torch.float32)}
        saver.save(2)
        again = Kept()
        assert restore(tmp_path, kept=again) == 2
        found: torch.Tensor = again.value["a"]
        return found

    for found in in_world(2, work):
        assert found.dtype == torch.float32
        assert bits(found) == bits(torch.arange(10, dtype=torch.float32))


@pytest.mark.parametrize("tensors", [8, 3000])
def test_a_trainer_killed_while_it_lays_out_a_slot_anew_leaves_no_torn_snapshot(tmp_path: Path, tensors: int) -> None:
    def work() -> tuple[int, Any]:
        kept = Kept({"a": torch.full((3000,), 1.0)})
        saver = Saver(tmp_path, kept=kept)
        saver.save(1)
        for step in (2, 3):
            kept.value = {"a": torch.full((3000,), float(step))}
            saver.manager.snapshot(saver.state, step, {"step": step})
        saver.slots.board.held = saver.slots.whole()[0].slot + 1  # step 2's is being saved

        def trainer() -> int:
            real = Layout.write_frames

            def write_frames(self: Layout, memory: memoryview) -> None:
                real(self, memory)
                os.kill(os.getpid(), signal.SIGKILL)

            Layout.write_frames = write_frames  # type: ignore[method-assign]
            kept.value = {f"t{number}": torch.full((70,), 7.0) for number in range(tensors)}
            saver.manager.snapshot(saver.state, 4, {"step": 4})
            return 0

        assert fork(trainer).wait() == -signal.SIGKILL
        restored = saver.restore()
        assert restored is not None
        return restored.step, kept.value

    step, value = alone(work)
    assert step == 2
    assert bits(value["a"]) == bits(torch.full((3000,), 2.0))


def test_nobody_waits_for_a_save_that_rank_0_could_not_begin(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[str, float]:
        saver = Saver(tmp_path, kept=Kept(1))

        def away(step: int) -> str:
            raise OSError("the network is gone")

        saver.catalog.new_attempt = away  # type: ignore[method-assign]
        begun = time.monotonic()
        with pytest.raises(SaveError) as found:
            saver.save(1)
        return str(found.value), time.monotonic() - begun

    for text, seconds in in_world(2, work):
        assert "step 1 could not be saved" in text
        assert "the network is gone" in text
        assert seconds < 10, "not timeout_s"
