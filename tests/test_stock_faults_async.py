"""Faults of stock torch's asynchronous saves; dtrain has none of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dtrain.checkpoint import load
from dtrain.errors import SaveError
from tests.saving import Background, Kept, bits, commits, log_of, restore
from tests.stock import filled, still, stock_load
from tests.world import alone, in_world


class WaitsAt(dcp.DefaultSavePlanner):
    """The save stands still before one of the tensors until it is told to go on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == self.name:
            self.reached.set()
            assert self.go_on.wait(timeout=30)
        return super().resolve_data(write_item)


def test_a_second_save_before_the_first_is_written_mixes_two_steps_in_stock(tmp_path: Path) -> None:
    def stock() -> list[dict[str, torch.Tensor]]:
        stager = DefaultStager(StagingOptions(False, False, False, False))  # there is no GPU
        live = {"a": filled(1.0), "b": filled(1.0)}
        slow = WaitsAt("b")
        options: dict[str, Any] = {"async_stager": stager, "no_dist": True}
        first: Any = dcp.async_save(live, checkpoint_id=str(tmp_path / "1"), planner=slow, **options)
        assert slow.reached.wait(timeout=30), "the first tensor of step 1 is on its way to disk"
        for tensor in live.values():
            tensor.fill_(2.0)
        second: Any = dcp.async_save(live, checkpoint_id=str(tmp_path / "2"), **options)
        slow.go_on.set()
        first.result(timeout=30)
        second.result(timeout=30)
        stager.close()
        return [stock_load(tmp_path / step, a=filled(0.0), b=filled(0.0)) for step in ("1", "2")]

    first, second = alone(stock)
    assert {name: tensor.unique().tolist() for name, tensor in second.items()} == {"a": [2.0], "b": [2.0]}
    found = {name: tensor.unique().tolist() for name, tensor in first.items()}
    still(found != {"a": [1.0], "b": [1.0]}, "a stager's buffers are written over while a save still reads them")


@pytest.mark.parametrize("world", [1, 3])
def test_a_second_save_before_the_first_is_written_waits_and_mixes_nothing_in_dtrain(
    tmp_path: Path, world: int
) -> None:
    """Step 1's writers are stopped while the state changes, snapshots are taken of it, and a save is asked for."""

    def work(rank: int) -> dict[int, list[list[float]]]:
        kept = Kept({"a": filled(1.0), "b": filled(1.0)})
        saver = Background(tmp_path, kept=kept)
        os.kill(saver.process.pid, signal.SIGSTOP)
        saver.begin(1)
        for value in (2.0, 3.0):
            for tensor in kept.value.values():
                tensor.fill_(value)
            saver.manager.snapshot(saver.state, int(value), {"step": int(value)})
        assert commits(tmp_path) == []
        os.kill(saver.process.pid, signal.SIGCONT)
        saver.begin(3)
        saver.manager.wait()
        assert saver.end() == 0
        dist.barrier()
        found = {}
        for entry in log_of(tmp_path).commits():
            load(tmp_path, {"kept": (again := Kept())}, step=entry.step)
            found[entry.step] = [tensor.unique().tolist() for tensor in again.value.values()]
        return found

    for found in in_world(world, work):
        assert found == {1: [[1.0], [1.0]], 3: [[3.0], [3.0]]}


def test_a_process_for_saving_that_died_is_never_started_again_by_stock(tmp_path: Path) -> None:
    def stock() -> list[str]:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        found = []

        def save_in_process(step: int) -> None:
            try:
                future: Any = dcp.async_save(
                    {"a": filled(float(step))},
                    checkpoint_id=str(tmp_path / str(step)),
                    async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                )
                future.result(timeout=60)
                found.append("saved")
            except (RuntimeError, OSError) as error:
                found.append(f"failed: {error}")

        try:
            save_in_process(1)
            (process,) = multiprocessing.active_children()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            save_in_process(2)
            save_in_process(3)
            assert multiprocessing.active_children() == []
        finally:
            for child in multiprocessing.active_children():
                child.kill()
                child.join()
        return found

    first, *others = alone(stock)
    assert first == "saved"
    still("saved" not in others, "a background process that died fails every save from then on")


def test_a_process_for_saving_that_died_is_replaced_in_dtrain_and_its_save_fails_on_all_ranks(tmp_path: Path) -> None:
    """It is killed while it has nothing to do, before it has read what is asked for, and when it is at it."""

    def work(rank: int) -> list[str]:
        kept = Kept({"a": filled(1.0), "b": filled(1.0)})
        saver = Background(tmp_path, kept=kept)
        if rank == 1:
            saver.replace()
        saver.save(1)
        if rank == 1:
            os.kill(saver.process.pid, signal.SIGSTOP)
        saver.begin(2)
        if rank == 1:
            saver.replace()
        saver.manager.wait()
        if rank == 0:  # rank 1's waits for it
            os.kill(saver.process.pid, signal.SIGSTOP)
        dist.barrier()
        saver.begin(4)
        if rank == 1:
            while saver.slots.board.asked < 3:
                time.sleep(0.001)
            saver.replace()
        dist.barrier()
        if rank == 0:
            os.kill(saver.process.pid, signal.SIGCONT)
        with pytest.raises(SaveError) as found:
            saver.manager.wait()
        dist.barrier()
        assert commits(tmp_path) == [1, 2]
        saver.save(5)
        dist.barrier()
        assert commits(tmp_path) == [1, 2, 5]
        assert saver.end() == 0
        return [str(found.value)]

    for messages in in_world(2, work):
        assert "the saver of rank 1 died while it saved" in messages[0]
    assert alone(lambda: restore(tmp_path, kept=(again := Kept())) and bits(again.value["b"])) == bits(filled(1.0))
