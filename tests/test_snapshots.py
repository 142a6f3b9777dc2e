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
    monkeypatch.setattr(snapshot, "free_bytes", lambda: 1000)

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


def left_by(saver: Saver) -> Slots:
    """Its slots, as a supervisor gets them that takes the place of its own."""
    return Slots(files=saver.slots.files)


@pytest.mark.parametrize(("before", "after", "step"), [(2, 2, 4), (2, 3, 4), (1, 4, 4), (3, 2, 1)])
def test_snapshots_of_an_earlier_group_are_restored_if_all_their_parts_are_there(
    tmp_path: Path, before: int, after: int, step: int
) -> None:
    """Of a group that has grown, some ranks have none; where it has shrunk, a part is missing."""
    slots = [Slots() for _ in range(max(before, after))]

    def first(rank: int) -> None:
        saver = Saver(tmp_path, kept=(kept := Kept(values(1))), slots=slots[rank])
        saver.save(1)
        kept.value = values(4)
        saver.manager.snapshot(saver.state, 4, {"step": 4})

    def second(rank: int) -> tuple[int, bytes, list[tuple[int, int]]]:
        saver = Saver(tmp_path, kept=(kept := Kept()), slots=Slots(files=slots[rank].files))
        restored = saver.restore()
        assert restored is not None
        own = [(s.rank, s.world_size) for s in saver.slots.whole() if s.epoch == saver.manager.epoch]
        return restored.step, bits(kept.value["w"]), own

    in_world(before, first)
    for rank, found in enumerate(in_world(after, second)):
        assert found[:2] == (step, bits(values(step)["w"]))
        assert found[2] == ([(rank, after)] if step == 4 else []), "it has one of its own at once"


def test_a_snapshot_of_an_earlier_group_is_saved_where_the_new_one_ends_before_its_first(tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        first = Saver(tmp_path, kept=Kept(values(1)))
        first.save(1)
        first.manager.snapshot(first.state, 4, {"step": 4})
        second = Saver(tmp_path, kept=Kept(), slots=left_by(first))
        second.saver.last(10)
        dist.barrier()
        assert commits(tmp_path) == [1, 4]
        third = Saver(tmp_path, kept=Kept(values(1)))
        third.save(3)  # as after a decision to go back
        fourth = Saver(tmp_path, kept=Kept(), slots=left_by(first))
        fourth.saver.last(10)
        dist.barrier()
        restored = fourth.restore()
        assert restored is not None
        return [*commits(tmp_path), restored.step]

    for found in in_world(2, work):
        assert found == [1, 4, 3, 3], "what is older than the last group's commit doesn't count any more"


def test_snapshots_are_good_for_all_after_the_first_ranks_saver_was_replaced(tmp_path: Path) -> None:
    """It claims the run anew, for the same group."""

    def work(rank: int) -> int:
        kept = Kept(values(1))
        saver = Background(tmp_path, kept=kept)
        saver.save(1)
        dist.barrier()
        if rank == 0:
            saver.replace()
        saver.save(2)
        kept.value = values(3)
        saver.manager.snapshot(saver.state, 3, {"step": 3})
        saver.manager.claim()  # as the next generation does
        restored = saver.restore()
        assert restored is not None
        assert saver.end() == 0
        return restored.step

    assert in_world(2, work) == [3, 3]


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
    (whole,) = copies = [torch.zeros(2000)]
    assert copying.copy(copies, [sources[4]], [True], threads=3) is None
    assert bits(whole) == bits(sources[4]), "one tensor for three of them"
    with pytest.raises(RuntimeError, match="size of tensor"):
        copying.copy(targets, [*sources[:-1], torch.zeros(3)], [True] * len(sources), threads=3)
