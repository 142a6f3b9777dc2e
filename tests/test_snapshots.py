"""Snapshots: what lies in memory, what it costs, and what is left of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dtrain.checkpoint import copying, plan, snapshot
from dtrain.checkpoint.slots import Slots
from tests.evidence import committed
from tests.places import Place
from tests.saving import Background, Kept, Saver, bits, commits, warnings
from tests.scripts import run
from tests.world import alone, in_world


def values(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(1000, 3, generator=generator), "b": torch.arange(step, step + 5), "step": step}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_newest_snapshot_that_all_ranks_have_comes_back_with_its_bits(tmp_path: Path, world: int) -> None:
    def work(rank: int) -> tuple[int | None, bytes, int]:
        saver = Saver(tmp_path, kept=(kept := Kept()))
        for step in (1, 2, 3):
            kept.value = values(step)
            if step == 1:
                saver.save(step)
            elif step == 2 or rank > 0 or world == 1:  # rank 0 of several dies before it has the third
                saver.manager.snapshot(saver.state, step, {"step": step})
        kept.value = None
        restored = saver.restore()
        assert restored is not None
        return restored.step, bits(kept.value["w"]), kept.value["step"]

    expected = 3 if world == 1 else 2
    for step, found, plain in in_world(world, work):
        assert (step, plain) == (expected, expected)
        assert found == bits(values(expected)["w"])


def test_a_snapshot_that_was_cut_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    def work() -> int | None:
        saver = Saver(tmp_path, kept=(kept := Kept(values(1))))
        saver.save(1)
        for step in (2, 3):
            kept.value = values(step)
            saver.manager.snapshot(saver.state, step, {"step": step})
        newest = max(saver.slots.board.slots, key=lambda slot: slot.number)
        newest.whole = 0  # as it is while the copy goes on
        restored = saver.restore()
        return None if restored is None else restored.step

    assert alone(work) == 2


def test_a_newer_checkpoint_is_preferred_to_an_older_snapshot(tmp_path: Path) -> None:
    def work() -> tuple[int, str]:
        first = Saver(tmp_path, kept=(kept := Kept(values(1))))
        first.manager.snapshot(first.state, 1, {"step": 1})
        second = Background(tmp_path, kept=kept)
        second.save(2)
        second.end()
        first.saver._catalogs[0].epoch = 0  # the same group goes on
        first.slots.board.epoch = 0
        first.manager.claim()
        restored = first.restore()
        assert restored is not None
        return restored.step, repr(restored.committed)

    assert alone(work) == (2, "True")


def test_the_slot_that_is_being_saved_is_never_written_to(tmp_path: Path) -> None:
    def work() -> list[int]:
        saver = Saver(tmp_path, kept=(kept := Kept()))
        slots = []
        for step in range(1, 6):
            kept.value = values(step)
            saver.manager.snapshot(saver.state, step, {"step": step})
            newest = saver.slots.whole()[-1]
            slots.append(newest.slot)
            if step == 2:
                saver.slots.board.held = newest.slot + 1
        return slots

    one, two, *others = alone(work)
    assert {one, two} == {0, 1}
    assert others == [one, one, one]


def test_another_structure_is_laid_out_anew(tmp_path: Path) -> None:
    def work() -> list[int]:
        saver = Saver(tmp_path, kept=(kept := Kept()))
        sizes = []
        for step, shape in enumerate([(10,), (3000, 7), (2,)], start=1):
            kept.value = {"w": torch.full(shape, float(step))}
            saver.save(step)
            found = Kept()
            kept.value, before = None, kept.value
            assert saver.restore() is not None
            assert bits(kept.value["w"]) == bits(before["w"])
            del found
            sizes.append(saver.slots.whole()[-1].size)
        return sizes

    sizes = alone(work)
    assert sizes[0] < 4096 < 3000 * 7 * 4 < sizes[1]
    assert sizes[2] < 4096


def test_where_memory_is_too_small_it_says_so_once_and_saves_over_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "available_bytes", lambda: (256 << 20) + 1000)

    def work(rank: int) -> list[int]:
        saver = Saver(tmp_path, kept=(kept := Kept()))
        for step in (1, 2, 3):
            kept.value = values(step)
            saver.save(step)
        assert saver.slots.whole() == []
        restored = saver.restore()
        assert restored is not None
        assert bits(kept.value["w"]) == bits(values(3)["w"])
        dist.barrier()
        return [restored.step]

    assert in_world(2, work) == [[3], [3]]
    assert commits(tmp_path) == [1, 2, 3]
    (said,) = set(warnings(tmp_path))
    assert "2 snapshots take 0 MiB of memory for each of 2 ranks here, but there are only 0 MiB in all" in said
    assert str(tmp_path) in said
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"events.jsonl", "log", "checkpoints"}


def test_nothing_of_a_snapshot_has_a_name(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))

    def work() -> set[str]:
        saver = Saver(tmp_path, kept=Kept({"w": torch.ones(100_000)}))
        saver.manager.snapshot(saver.state, 1, {"step": 1})
        assert saver.slots.whole()[0].size > 400_000
        return set(os.listdir("/dev/shm"))

    assert alone(work) == before


def test_a_snapshot_keeps_views_complex_numbers_and_empty_tensors(tmp_path: Path) -> None:
    table = torch.arange(24.0).reshape(4, 6)
    given = {
        "turned": table.t(),
        "part": table[1:3, ::2],
        "conjugated": torch.complex(table, table + 1).conj(),
        "none": torch.empty(0, 3),
        "number": torch.tensor(7, dtype=torch.int16),
        "half": table.bfloat16(),
        "yes": torch.tensor([True, False]),
    }

    def work() -> dict[str, bytes]:
        saver = Saver(tmp_path, kept=(kept := Kept(given)))
        saver.manager.snapshot(saver.state, 1, {"step": 1})
        kept.value = None
        assert saver.restore() is not None
        return {name: bits(tensor) for name, tensor in kept.value.items()}

    assert alone(work) == {name: bits(tensor) for name, tensor in given.items()}


def test_slots_are_empty_at_first_and_differ_from_each_other() -> None:
    slots = Slots()
    assert slots.whole() == []
    assert len({slots.in_memory(index) for index in slots.own}) == 2


def test_a_run_that_fails_for_good_leaves_its_newest_snapshot_as_a_checkpoint(tmp_path: Path) -> None:
    found = run(tmp_path, "--fail-at", 4, "--save-every", 1000, "--snapshot-every", 1)
    assert found.code == 1
    assert commits(tmp_path) == [3]
    assert len(committed(Place(str(tmp_path)))) == 1


def test_the_plan_is_made_once_while_the_structure_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = plan.local_items

    def counted(*args: Any) -> Any:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(snapshot, "local_items", counted)

    def work() -> int:
        model = nn.Linear(3, 4)
        saver = Saver(tmp_path, model=model)
        for step in range(1, 6):
            with torch.no_grad():
                model.weight.fill_(float(step))
            saver.manager.snapshot(saver.state, step, {"step": step})
        return len(made)

    assert alone(work) == 1


def test_several_threads_copy_the_same_bits_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_COPY_BYTES", 1000)
    sources = [torch.randn(size) for size in (7, 500, 0, 30, 2000, 1, 499)]
    targets = [torch.zeros_like(source) for source in sources]
    assert copying.copy(targets, sources, [True] * len(sources), threads=3) is None
    assert all(bits(target) == bits(source) for target, source in zip(targets, sources, strict=True))
    with pytest.raises(RuntimeError, match="size of tensor"):
        copying.copy(targets, [*sources[:-1], torch.zeros(3)], [True] * len(sources), threads=3)
