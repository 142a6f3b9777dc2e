"""Planning and commit of up to thousands of ranks, of which one is real and the others are simulated.

Every rank holds its shard of the same 500 tensors, cut along the first dimension as FSDP2 does it.

- plan: a rank works out what it writes and how its file is laid out; cached: it sees that nothing has changed.
- reports: four processes put the reports of all ranks into a real TCPStore, by dtrain's own `Agreement`.
- commit: the coordinator fetches them, makes manifest and index, writes and syncs both, and adds an entry to the log.
  The first report of a rank tells where its items lie; later ones hold digests, and the index is used again.
- stock DCP: every rank sends its plan to one, which makes a global plan of them, checks it and sends each rank its
  own back; in the end it writes `.metadata`. What is sent is pickled and unpickled on the coordinator, as stock does,
  but goes nowhere: the network's share is missing.

    python benchmarks/checkpoint_planning.py
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtrain.checkpoint.agreement import Agreement, Outcome, Report
from dtrain.checkpoint.format import DIGEST_BYTES, Part, digest, json_text
from dtrain.checkpoint.index import Indexes
from dtrain.checkpoint.layout import Layout
from dtrain.checkpoint.plan import local_items
from dtrain.checkpoint.slots import Slots
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.tree import encode
from dtrain.checkpoint.writer import shard_name
from dtrain.elastic.process import fork
from dtrain.storage.local import LocalStorage

T = TypeVar("T")

RANKS = (64, 256, 1024, 4096)
PROMISED_RANKS = 1024
TENSORS = 500
ROWS, COLUMNS = 4, 256
"""Of a rank's shard of each tensor. How large it is doesn't matter here, as long as it is one block."""
CLIENTS = 4
SAVES = 3
STOCK_MOST_S = 60.0
"""Stock's planning is left out where it would take longer than that."""


def planning(ranks: int, root: Path) -> dict[str, float]:
    """dtrain's figures, in seconds but for `first_report_bytes` and `report_bytes` of one rank.

    :param root: an empty folder on the disk that manifest and index are written to.
    """
    tensors = shards(ranks)
    # fmt: off
    snapshots = Snapshots(
        Slots(), rank=0, world_size=ranks, local_world_size=1, generation=1, spill=str(root), say=print
    )
    # fmt: on
    found = {
        "plan": timed(lambda: snapshots._lay_out(tensors, tensors))[0],
        "plan_cached": min(timed(lambda: snapshots._lay_out(tensors, tensors))[0] for _ in range(5)),
    }
    layout = Layout(local_items(tensors, 0, ranks))
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [fork(partial(_report, server.port, ranks, client, layout)) for client in range(CLIENTS)]
    try:
        agreement = Agreement(lambda: server, 0, ranks, 300.0)
        indexes, storage = Indexes(), LocalStorage(str(root))
        tree = json_text(encode(tensors))
        server.wait([f"ready/{client}" for client in range(CLIENTS)])
        for number in range(SAVES):
            started = time.perf_counter()
            server.set(f"go/{number}", "")
            server.wait([f"sent/{number}/{client}" for client in range(CLIENTS)])
            sent = time.perf_counter()
            _commit(agreement, indexes, storage, str(number), tree)
            found["reports_first" if number == 0 else "reports"] = sent - started
            found["commit_first" if number == 0 else "commit"] = time.perf_counter() - sent
    finally:
        for child in clients:
            child.kill()
    found["first_report_bytes"] = len(layout.items) + len(layout.tensors)
    found["report_bytes"] = len(_report_of(layout, "0").to_bytes())
    return found


def _commit(agreement: Agreement, indexes: Indexes, storage: LocalStorage, save: str, tree: str) -> None:
    """What the coordinator does once the reports are there."""
    reports = agreement.reports(save)
    layouts = agreement.layouts(reports)
    parts = [
        Part(file=shard_name(rank), size=report.size, items=items, digests=report.digests)
        for rank, (report, (items, _)) in enumerate(zip(reports, layouts, strict=True))
    ]
    manifest = indexes.write(
        storage,
        save,
        parts,
        step=int(save),
        world_size=len(parts),
        tree=tree,
        tensors=[tensors for _, tensors in layouts],
        key=tuple(report.layout for report in reports),
    )
    storage.create(f"log/{save}.json", manifest.encode())
    agreement.conclude(save, Outcome())


def _report(port: int, ranks: int, client: int, layout: Layout) -> int:
    """Stand for the savers of every CLIENTS-th rank."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    mine = range(client, ranks, CLIENTS)
    agreements = {rank: Agreement(lambda: store, rank, ranks, 300.0) for rank in mine}
    texts = {rank: _items_of(layout, rank) for rank in mine}
    reports = {rank: _report_of(layout, digest(texts[rank].encode())) for rank in mine}
    store.set(f"ready/{client}", "")
    for number in range(SAVES):
        store.wait([f"go/{number}"])
        for rank in mine:
            agreements[rank].report(str(number), reports[rank], texts[rank], layout.tensors)
        store.set(f"sent/{number}/{client}", "")
    return 0


def _items_of(layout: Layout, rank: int) -> str:
    """The text of a rank's items; it differs from that of rank 0 in where the boxes begin."""
    return json_text(
        [[p.name, p.offset, p.length, len(p.frame.head), [rank * ROWS, 0], list(p.sizes)] for p in layout.places]
    )


def _report_of(layout: Layout, key: str) -> Report:
    digests = os.urandom(DIGEST_BYTES * len(layout.places))
    objects = {name: digest(name.encode()) for name in ("model", "optimizer")}
    return Report(layout=key, size=layout.size, objects=objects, digests=digests)


def stock_planning(ranks: int, root: Path) -> dict[str, float]:
    """Stock DCP's figures, in seconds."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(shards(ranks)), is_coordinator=True)
    plan_s, plan = timed(planner.create_local_plan)
    plans = [SavePlan([_of_rank(item, rank) for item in plan.items]) for rank in range(ranks)]
    sent = [pickle.dumps(one) for one in plans]  # on each rank its own
    gather_s, plans = timed(lambda: [pickle.loads(data) for data in sent])
    global_s, (plans, metadata) = timed(lambda: planner.create_global_plan(plans))
    writer = FileSystemWriter(root / "stock")
    writer.set_up_storage_writer(True, rank=0)
    scatter_s, _ = timed(lambda: [pickle.dumps(one) for one in writer.prepare_global_plan(plans)])
    results = [
        pickle.dumps([WriteResult(i.index, 1, _StorageInfo(shard_name(rank), 0, 1)) for i in one.items])
        for rank, one in enumerate(plans)
    ]
    (root / "stock").mkdir()
    commit_s, _ = timed(lambda: writer.finish(metadata, [pickle.loads(data) for data in results]))
    return {"plan": plan_s + gather_s + global_s + scatter_s, "commit": commit_s}


def _of_rank(item: WriteItem, rank: int) -> WriteItem:
    data = item.tensor_data
    assert data is not None
    offsets = torch.Size([rank * ROWS, 0])
    data = dataclasses.replace(data, chunk=ChunkStorageMetadata(offsets, data.chunk.sizes))
    return dataclasses.replace(item, index=MetadataIndex(item.index.fqn, offsets), tensor_data=data)


def shards(ranks: int) -> dict[str, torch.Tensor]:
    """What rank 0 of so many holds. Makes a process group of that size, in which nobody else is."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = DeviceMesh("cpu", torch.arange(ranks))
    return {
        f"model.blocks.{number // 10}.part{number % 10}.weight": DTensor.from_local(
            torch.empty(ROWS, COLUMNS), mesh, [Shard(0)], run_check=False
        )
        for number in range(TENSORS)
    }


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    outcome = work()
    return time.perf_counter() - started, outcome


def print_planning(promise: Callable[[str, str, float, float], None], root: Path) -> None:
    """Print the table. It may fork, so it has to be called while the process has no threads.

    :param promise: is told each promise's name, where it was measured, its value and its bound.
    """
    print(f"\nplanning and commit with {TENSORS} tensors; the ranks but one are simulated; times in s")
    print(
        f"{'':6}{'a plan,':>9}{'':8}  {'reports,':>9}{'':8}  {'commit,':>9}{'':9}{'KiB a':>9}    {'stock: plan,':>12}"
    )
    print(
        f"{'ranks':6}{'first':>9}{'cached':>8}  {'first':>9}{'later':>8}  {'first':>9}{'later':>9}{'rank':>9}", end=""
    )
    print(f"    {'uncached':>12}{'commit':>8}")
    stock: Mapping[str, float] | None = {}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            ours = planning(ranks, Path(folder))
            if stock is not None:
                # Four times the ranks took up to ten times as long.
                stock = stock_planning(ranks, Path(folder)) if 10 * sum(stock.values()) < STOCK_MOST_S else None
        print(f"{ranks:<6}{ours['plan']:9.4f}{ours['plan_cached']:8.4f}", end="")
        print(f"  {ours['reports_first']:9.3f}{ours['reports']:8.3f}", end="")
        print(f"  {ours['commit_first']:9.3f}{ours['commit']:9.3f}{ours['report_bytes'] / 1024:9.1f}", end="")
        past = f"    over {STOCK_MOST_S:.0f} s"
        print(f"    {stock['plan']:12.3f}{stock['commit']:8.3f}" if stock is not None else past, flush=True)
        if ranks == PROMISED_RANKS:
            where = f"{ranks} ranks"
            promise("cached plan, ms <= 50", where, 1e3 * ours["plan_cached"], 50.0)
            promise("commit with cached plans, s <= 2", where, ours["commit"], 2.0)
            promise("the first commit, s <= 2", where, ours["commit_first"], 2.0)
    dist.destroy_process_group()


if __name__ == "__main__":
    print_planning(
        lambda what, where, value, bound: print(f"{what}: {value:.3f} in {where}"), Path(tempfile.gettempdir())
    )
