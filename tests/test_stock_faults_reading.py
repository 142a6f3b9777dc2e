"""Faults of stock torch's checkpoints that show when one is read; dtrain has none of them.

One more is in `test_stock`: stock runs the code that somebody has put into a checkpoint.
"""

from __future__ import annotations

import math
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dtrain.checkpoint.format import BLOCK_BYTES, MANIFEST, METADATA, Manifest, digest
from dtrain.checkpoint.log import Entry
from dtrain.checkpoint.reader import Reader
from dtrain.errors import NoGoodCheckpoint, StateError
from dtrain.storage.local import LocalStorage
from tests.saving import Kept, bad, bits, folder_of, log_of, restore, save
from tests.stock import filled, still, stock_load
from tests.world import alone, errors, in_world

SHARD = "__0_0.distcp"
FLIPS = 200


def flipped(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def places(path: Path) -> list[tuple[int, int]]:
    """Bytes of a file and bits of them."""
    pick = random.Random(5)
    return [(pick.randrange(path.stat().st_size), pick.randrange(8)) for _ in range(FLIPS)]


def test_a_flipped_bit_loads_in_stock_and_never_in_dtrain(tmp_path: Path) -> None:
    value = torch.randn(8192, generator=torch.Generator().manual_seed(3))
    root, copy = tmp_path / "run", tmp_path / "copy"

    def stock() -> tuple[int, int]:
        """How many flips were taken without an error, and how many of them gave a wrong tensor."""
        folder = tmp_path / "stock"
        dcp.save({"value": value}, checkpoint_id=str(folder))
        path = folder / SHARD
        taken = wrong = 0
        for place, bit in places(path):
            flipped(path, place, bit)
            try:
                found = stock_load(folder, value=torch.zeros_like(value))["value"]
                taken += 1
                wrong += bits(found) != bits(value)
            except (Exception, CheckpointException):  # which is no Exception; any error is better than none
                pass
            flipped(path, place, bit)
        return taken, wrong

    taken, wrong = alone(stock)
    still(taken > 0.9 * FLIPS, "there is no check of contents: nearly every flipped bit loads without an error")
    still(wrong > 0.9 * FLIPS, "what loads is wrong")

    def dtrain() -> tuple[int, list[str]]:
        """How many flips were refused, and those that gave a wrong tensor."""
        refused, wrong = 0, []
        shard = folder_of(root, 1).relative_to(root) / SHARD
        for place, bit in places(root / shard):
            shutil.copytree(root, copy)
            flipped(copy / shard, place, bit)
            kept = Kept()
            try:
                assert restore(copy, kept=kept) == 1
                wrong += [] if bits(kept.value) == bits(value) else [f"bit {bit} of byte {place}"]
            except NoGoodCheckpoint as error:
                refused += SHARD in str(error)
            shutil.rmtree(copy)
        return refused, wrong

    alone(lambda: save(root, 1, kept=Kept(value)))
    refused, mistaken = alone(dtrain)
    assert mistaken == []
    assert refused > 0.9 * FLIPS, "the others lie between the items, where nothing is read"


class Into(dcp.DefaultLoadPlanner):
    """Loads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target


def slice_of(reader: dcp.StorageReader, name: str, start: int) -> tuple[torch.Tensor, int]:
    """Sixteen elements of a tensor of one dimension, and how many bytes were read from files for them."""
    target = torch.zeros(16)
    index = MetadataIndex(name, torch.Size([0]))
    lengths = torch.Size([16])
    item = ReadItem(LoadItemType.TENSOR, index, torch.Size([0]), index, torch.Size([start]), lengths)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    before = bytes_read()
    reader.read_data(LoadPlan([item]), Into(target)).wait()
    return target, bytes_read() - before


def bytes_read() -> int:
    """By this process up to now, from whatever it read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_slice_of_a_tensor_costs_all_of_it_in_stock_and_at_most_a_block_in_dtrain(tmp_path: Path) -> None:
    value = torch.arange(4 << 20, dtype=torch.float32)  # 16 MiB
    start = 1 << 19  # in the middle of the first block of 4 MiB
    root = tmp_path / "run"

    def stock() -> tuple[torch.Tensor, int]:
        dcp.save({"kept": value}, checkpoint_id=str(tmp_path / "stock"))
        return slice_of(dcp.FileSystemReader(tmp_path / "stock"), "kept", start)

    found, read = alone(stock)
    assert bits(found) == bits(value[start : start + 16])
    still(read >= value.nbytes, "a slice of 64 bytes reads the whole tensor")

    def dtrain() -> tuple[torch.Tensor, int]:
        save(root, 1, kept=Kept(value))
        folder = folder_of(root, 1)
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        return slice_of(Reader(LocalStorage(str(root)), str(folder.relative_to(root)), manifest), "kept", start)

    found, read = alone(dtrain)
    assert bits(found) == bits(value[start : start + 16])
    assert read <= BLOCK_BYTES + 4096, "a block, and the frame that stands before the tensor"


def test_every_rank_reads_the_index_in_stock_and_one_in_dtrain(tmp_path: Path) -> None:
    def opened(name: str, work: Any) -> int:
        """How often a file of this name was opened for reading."""
        found = []

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and str(args[0]).endswith(f"/{name}"):
                found.append(args[0])

        sys.addaudithook(hook)
        work()
        return len(found)

    folder, root = tmp_path / "stock", tmp_path / "run"
    alone(lambda: dcp.save({"value": filled(1.0)}, checkpoint_id=str(folder)))
    alone(lambda: save(root, 1, kept=Kept(filled(1.0))))

    def stock(rank: int) -> int:
        target = {"value": filled(0.0)}
        return opened(METADATA, lambda: dcp.load(target, checkpoint_id=str(folder)))

    still(in_world(3, stock) == [1, 1, 1], "every rank opens .metadata")
    assert in_world(3, lambda rank: opened(MANIFEST, lambda: restore(root, kept=Kept()))) == [1, 0, 0]
    assert in_world(3, lambda rank: opened(METADATA, lambda: restore(root, kept=Kept()))) == [0, 0, 0]


def test_a_path_that_leads_out_of_the_folder_is_followed_by_stock_and_refused_by_dtrain(tmp_path: Path) -> None:
    folder, elsewhere, root = tmp_path / "stock", tmp_path / "elsewhere", tmp_path / "run"

    def stock() -> float:
        dcp.save({"value": filled(1.0)}, checkpoint_id=str(folder))
        dcp.save({"value": filled(7.0)}, checkpoint_id=str(elsewhere))
        index = pickle.loads((folder / METADATA).read_bytes())
        for info in index.storage_data.values():
            info.relative_path = f"../{elsewhere.name}/{SHARD}"
        (folder / METADATA).write_bytes(pickle.dumps(index))
        return stock_load(folder, value=filled(0.0))["value"].mean().item()

    still(alone(stock) == 7.0, "relative_path follows '..' out of the checkpoint's folder")

    def dtrain() -> tuple[int | None, Any]:
        save(root, 1, kept=Kept(filled(1.0)))
        planted = folder_of(root, 1).with_name("step-00000002.e1.planted")
        shutil.copytree(folder_of(root, 1), planted)
        shutil.copy(planted / SHARD, tmp_path)  # with the right bytes, so that nothing but its place is wrong
        manifest = (planted / MANIFEST).read_text().replace(SHARD, f"../../../{SHARD}")
        (planted / MANIFEST).write_text(manifest)
        log = log_of(root)
        epoch = log.claim(0.0, "planted").epoch
        found = digest(manifest.encode())
        log.append(Entry(kind="commit", epoch=epoch, time=0.0, step=2, attempt=planted.name, manifest=found))
        return restore(root, kept=Kept()), log.commits()[-1].step

    assert alone(dtrain) == (1, 2)
    (entry,) = bad(root)
    assert entry.attempt == "step-00000002.e1.planted"
    assert "leads out of the run folder" in entry.reason


def test_another_type_is_cast_without_a_word_by_stock_and_refused_by_dtrain(tmp_path: Path) -> None:
    exact = 1.0 + 2.0**-20

    def stock() -> float:
        dcp.save({"weight": filled(exact)}, checkpoint_id=str(tmp_path / "stock"))
        target = torch.zeros(8192, dtype=torch.bfloat16)
        return stock_load(tmp_path / "stock", weight=target)["weight"][0].item()

    found = alone(stock)
    still(math.isclose(found, exact, abs_tol=0.01) and found != exact, "a type that differs is cast on load")

    alone(lambda: save(tmp_path / "run", 1, model=nn.Linear(2, 2)))
    (error,) = errors(1, lambda rank: restore(tmp_path / "run", model=nn.Linear(2, 2).bfloat16()))
    assert isinstance(error, StateError)
    assert "model.weight: saved as float32, now bfloat16" in str(error)
