"""What a checkpoint costs: dtrain beside the machine's own limits, beside stock DCP and beside torch_checkpointing.

All save and load the same state: a GPT's 196 parameter tensors, the two moments that AdamW keeps of each, and its step
counts. With two ranks and more it is sharded by FSDP2, so that each writes its part; `--layout replicated` gives every
rank all of it, as under DDP. All take turns in the same processes, with the limits between them, so that whatever else
the machine does falls on all; a figure is the median of the rounds, and of several ranks the slowest one counts.

- stall: from the call of save until weights may change again, the building of the state dict counted in. The limit
  is a copy of the rank's bytes into memory that is warm, by one thread.
- durable: from the call until all ranks' bytes are synced. The limit is a plain write with fsync, a file a rank.
- load: into the training's own tensors. The limit is a plain read. Files are in the page cache for both.
- beside: how much slower steps of 50 ms become while a save is under way.
- memory: the peak beyond the training's own while saving to disk, of all processes: anonymous memory, memory that
  they share, and files in tmpfs.
- planning: up to 4,096 ranks that are only simulated, see `checkpoint_planning.py`.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --quick               under a minute: 256 MiB, one rank, one target
    python benchmarks/checkpoint.py --disk /data --parts stall,durable
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import pickle
import platform
import select
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import tyro
from checkpoint_peers import (
    AsyncSave,
    CachedAsyncSave,
    Engine,
    Limits,
    ProcessAsyncSave,
    Save,
    TorchCheckpointing,
    Training,
)
from checkpoint_planning import print_planning

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.channel import Remote, send, serve
from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.reader import load_tensors, read_manifest
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.snapshot import Slots, Snapshots
from dtrain.checkpoint.state import State
from dtrain.checkpoint.tree import flatten
from dtrain.config import Config
from dtrain.elastic.process import Child, fork
from dtrain.observe.events import Events
from dtrain.storage.local import LocalStorage

T = TypeVar("T")

MIB = 1 << 20
STEP_S = 0.05
SETTLE_S = 0.5
"""Before a load, for what engines do after a save that nobody waits for, such as to delete an older one."""
PARTS = ("stall", "durable", "load", "beside", "memory", "planning")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure saving and loading; lists are given with commas."""

    sizes: str = "256,2048"
    """MiB of state, over all ranks together."""

    ranks: str = "1,2"
    """Processes."""

    targets: str = "memory,disk"
    """Where it is saved: `memory` is a folder in /dev/shm, `disk` one in `--disk`."""

    disk: Path = Path(tempfile.gettempdir())
    """A folder on a real disk; what is written there is deleted again."""

    rounds: int = 3
    """Saves and loads by each, after one that isn't counted."""

    parts: str = ",".join(PARTS)
    """What to measure."""

    layout: str = "sharded"
    """`sharded` or `replicated`, with two ranks and more."""

    quick: bool = False
    """256 MiB, one rank, and the disk only; without the planning."""


class Dtrain:
    """dtrain's own row: the engine as it runs under a supervisor, a process for each rank's saver."""

    def __init__(self, training: Training, folder: Path) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._folder = folder
        self._storage, events = LocalStorage(str(folder)), Events(str(folder))
        self._state = State()
        self._state.track({"model": training.model, "optimizer": training.optimizer})
        config = Config(dir=str(folder), global_batch=1, micro_batch=1, keep_last=2)
        self._slots, self._step = Slots(), 0
        snapshots = Snapshots(
            self._slots,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
            generation=0,
            spill=str(folder),
            say=events.warn,
        )
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)

        def connect() -> dist.Store:
            return dist.PrefixStore(f"savers/{name[0]}", dist.distributed_c10d._get_default_store())

        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def work() -> int:
            os.nice(15)  # as a supervisor does it
            serve(theirs, Saver.of(config, connect, rank, world_size, self._slots), self._slots.board)
            return 0

        self._process = fork(work)
        client = Remote(self._ours, self._slots.board, 0)
        self._manager = Manager(self._storage, client, self._slots, snapshots, events)
        self._manager.claim()

    def save(self, training: Training) -> float:
        started = time.perf_counter()
        self._step += 1
        self._manager.save(self._state, self._step, {"step": self._step})
        return time.perf_counter() - started

    def under_way(self) -> bool:
        return self._manager.busy

    def wait(self) -> None:
        self._manager.wait()

    def drop(self) -> None:
        pass  # the newest two are kept, as in a run

    def load(self, training: Training) -> None:
        log = Log(self._storage)
        log.refresh()
        commit = log.commits()[-1]
        folder = f"{CHECKPOINTS}/{commit.attempt}"
        _, manifest = read_manifest(self._storage, folder, MANIFEST, commit.manifest)
        leaves = {name: leaf for name, (_, leaf) in flatten(self._state.tree({})).items()}
        load_tensors(self._storage, folder, manifest, {name: leaves[name] for name in manifest.tensors})

    def close(self) -> None:
        send(self._ours, do="end")
        self._process.wait()


ENGINES: dict[str, Callable[[Training, Path], Engine]] = {
    "dtrain": Dtrain,
    "dcp.save": Save,
    "dcp.async_save": AsyncSave,
    "  stager kept, thread": CachedAsyncSave,
    "  stager kept, process": ProcessAsyncSave,
    "torch_checkpointing": TorchCheckpointing,
}
LOADS = ("dtrain", "dcp.save", "torch_checkpointing")
"""Those of the engines that load in a way of their own."""
APART = ("  stager kept, process", "torch_checkpointing")
"""Those that take their turns by themselves, with limits of their own, where memory is too small for all at once."""
IN_BACKGROUND = tuple(name for name in ENGINES if name != "dcp.save")
BRIEFLY = ("dtrain", "  stager kept, thread")
"""The engines that a quick run looks at beside steps, and whose memory it takes."""


@dataclass
class Figures:
    """What one engine, or the limits, needed in each round, in seconds; of all ranks the slowest."""

    stall: list[float] = field(default_factory=list)
    """Of the limits: the copy; `durable` and `load` are then the plain write and read."""
    durable: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    """By each rank in a load, as the kernel counts what was read from files; mapped files don't count."""
    remark: str = ""


@dataclass
class Beside:
    """Steps beside a save, of the slowest rank."""

    slower: float
    """1 is twice as slow."""
    save_s: float
    steps: int


class Rank:
    """What is measured in each rank's process, with a state of this size."""

    def __init__(self, o: Options, mib: int, say: Callable[[str], None]) -> None:
        self._o = o
        self._say = say
        self.ranks = dist.get_world_size()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.training = Training(mib * MIB, sharded=o.layout == "sharded" and self.ranks > 1, device=device)

    def rounds(self, names: Sequence[str], target: str, root: Path) -> dict[str, Figures]:
        """Saves and loads by these engines in turn, with the limits between them."""
        training, limits = self.training, Limits(self.training)
        limits.copy()
        engines = {name: ENGINES[name](training, root / str(n)) for n, name in enumerate(names)}
        figures = {name: Figures() for name in ("limit", *engines)}
        plain = root / f"plain.{dist.get_rank()}"
        for number in range(self._o.rounds + 1):
            for name, engine in engines.items():
                self._say(f"{target}, round {number} of {self._o.rounds}: {name.strip()}")
                taken = figures[name]
                dist.barrier()
                started = time.perf_counter()
                stall = engine.save(training)
                engine.wait()
                durable = slowest(time.perf_counter() - started)
                taken.stall.append(slowest(stall))
                taken.durable.append(durable)
                if isinstance(engine, TorchCheckpointing):
                    taken.remark = f"no fsync; save returns after {1e3 * engine.returned_s:.0f} ms of it"
                if name in LOADS and wanted(self._o, "load"):
                    time.sleep(SETTLE_S)
                    if dist.get_rank() == 0:
                        warm(root)
                    training.blank()
                    before = bytes_read()
                    taken.load.append(self._timed(partial(engine.load, training)))
                    taken.read_bytes = gathered(bytes_read() - before)
                    if differ := limits.differ():
                        raise AssertionError(f"{name}: {differ} tensors came back other than they were saved")
                engine.drop()
            self._say(f"{target}, round {number} of {self._o.rounds}: limits")
            figures["limit"].stall.append(self._timed(limits.copy))
            figures["limit"].durable.append(self._timed(partial(limits.write, plain)))
            figures["limit"].load.append(self._timed(partial(limits.read, plain)))
            plain.unlink()
        for engine in engines.values():
            engine.close()
        for taken in figures.values():
            for times in (taken.stall, taken.durable, taken.load):
                del times[:1]
        return figures

    def beside(self, root: Path) -> dict[str, Beside | None]:
        """Steps with and without a save under way; None for an engine that never saves in the background."""
        step = one_step()
        found: dict[str, Beside | None] = {}
        for n, name in enumerate(BRIEFLY if self._o.quick else IN_BACKGROUND):
            self._say(f"steps beside {name.strip()}")
            engine = ENGINES[name](self.training, root / f"beside.{n}")
            idle, busy, saves = [], [], []
            for number in range(self._o.rounds + 1):
                dist.barrier()
                alone = [step() for _ in range(12)]
                started = time.perf_counter()
                engine.save(self.training)
                during = []
                while engine.under_way():
                    during.append(step())
                engine.wait()
                if number:
                    saves.append(time.perf_counter() - started)
                    idle += alone[2:]
                    busy += during
                engine.drop()
            engine.close()
            slower = statistics.mean(busy) / statistics.mean(idle) - 1 if busy else -1.0
            slower = slowest(slower)
            found[name] = Beside(slower, slowest(statistics.median(saves)), len(busy)) if slower > -1 else None
        return found

    def memory(self, name: str, root: Path) -> tuple[float, float, float]:
        """Save a few times. :returns: when that began and ended, before which nothing but the training was there."""
        dist.barrier()
        quiet = time.monotonic()
        time.sleep(0.5)  # for whoever samples the memory meanwhile
        started = time.monotonic()
        engine = ENGINES[name](self.training, root)
        for _ in range(3):
            engine.save(self.training)
            engine.wait()
            engine.drop()
        ended = time.monotonic()
        engine.close()
        return quiet, started, ended

    def _timed(self, work: Callable[[], None]) -> float:
        dist.barrier()
        started = time.perf_counter()
        work()
        return slowest(time.perf_counter() - started)


def rounds(
    o: Options, mib: int, names: Sequence[str], target: str, root: Path, say: Callable[[str], None]
) -> dict[str, Figures]:
    return Rank(o, mib, say).rounds(names, target, root)


def beside(o: Options, mib: int, root: Path, say: Callable[[str], None]) -> dict[str, Beside | None]:
    return Rank(o, mib, say).beside(root)


def peak(o: Options, mib: int, name: str, root: Path, say: Callable[[str], None]) -> tuple[float, float, float]:
    return Rank(o, mib, say).memory(name, root)


def slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def gathered(value: T) -> list[T]:
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def warm(folder: Path) -> None:
    """Have all files in the page cache, however they were written."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(16 * MIB):
                    pass


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def one_step() -> Callable[[], float]:
    """A step of 50 ms when nothing else runs; it returns its time. Many small operations, as in a training."""
    a, b = torch.randn(2, 192, 192).unbind()

    def work(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        return time.perf_counter() - started

    count = round(STEP_S / min(work(50) for _ in range(10)) * 50)
    return partial(work, count)


def wanted(o: Options, *parts: str) -> bool:
    return any(part in o.parts.split(",") for part in parts)


class World:
    """Forks ranks, and sees to it that nothing of them is left: no process, no file."""

    def __init__(self, roots: list[Path]) -> None:
        self._roots = roots
        # What a rank has started becomes ours when the rank ends, so that it can be found.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def run(
        self, ranks: int, work: Callable[[Callable[[str], None]], Any], each: Callable[[], None] | None = None
    ) -> Any:
        """What `work` returned on rank 0. :param each: is called again and again meanwhile."""
        children: list[Child] = []
        store = tempfile.mkdtemp(dir=self._roots[0])
        end, start = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            for rank in range(ranks):
                child = fork(partial(self._rank, rank, ranks, store, work, start, log.fileno()))
                children.append(child)  # one by one: if a fork fails, those before it are ended
            os.close(start)
            data, running = b"", list(children)
            while True:
                ready, _, _ = select.select([end, *(child.pidfd for child in running)], [], [], 0.05)
                part = os.read(end, 1 << 20) if end in ready else b""
                data += part
                ended = end in ready and not part  # all ranks have closed it
                done = [child for child in running if ended or child.pidfd in ready]
                running = [child for child in running if child not in done]
                codes = [child.wait() for child in done]
                if any(codes):
                    log.seek(0)
                    sys.exit(f"{log.read().decode(errors='replace')[-4000:]}\na rank has failed, see above")
                if ended:
                    return pickle.loads(data)
                if each is not None:
                    each()
        finally:
            for child in children:
                child.kill()
            end_descendants()
            os.close(end)
            log.close()
            for root in self._roots:
                for path in root.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @staticmethod
    def _rank(rank: int, ranks: int, store: str, work: Callable[..., Any], start: int, log: int) -> int:
        terminal = os.fdopen(os.dup(2), "w")
        os.dup2(log, 2)  # the peers and what they start say much; it is shown when a rank fails
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"
        found = dist.FileStore(f"{store}/store", ranks)
        dist.init_process_group(backend, store=found, rank=rank, world_size=ranks)
        begun = time.monotonic()

        def say(text: str) -> None:
            if rank == 0 and terminal.isatty():
                terminal.write(f"\r\033[K{time.monotonic() - begun:4.0f} s  {text}\r")
                terminal.flush()

        outcome = work(say)
        say("")
        if rank == 0:
            with os.fdopen(start, "wb") as file:
                file.write(pickle.dumps(outcome))
        return 0


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def end_descendants() -> None:
    """Of this process. Those of a process that is killed become its own."""
    while children := children_of(os.getpid()):
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Memory:
    """Samples what this process and all below it hold: anonymous memory, and memory that is a file in tmpfs."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []

    def sample(self) -> None:
        anonymous, shared = 0, dict[tuple[int, int], int]()
        pids = [os.getpid()]
        for pid in pids:
            pids += children_of(pid)
            with suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                anonymous += sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if "Pss_Anon:" in line)
                for path in self._tmpfs_files(pid):
                    with suppress(OSError):
                        status = os.stat(path)
                        shared[status.st_dev, status.st_ino] = 512 * status.st_blocks
        self._samples.append((time.monotonic(), anonymous + sum(shared.values())))

    def grown(self, quiet: float, started: float, ended: float) -> int:
        """The peak between `started` and `ended`, beyond what there was between `quiet` and `started`."""
        before = [held for at, held in self._samples if quiet < at < started]
        return max(held for at, held in self._samples if started < at < ended) - min(before)

    @staticmethod
    def _tmpfs_files(pid: int) -> Iterator[str]:
        """By paths through which they can be looked at, whether they still have a name or not."""
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if any(place in line for place in ("/dev/shm/", "/memfd:", "/dev/zero")):
                yield f"/proc/{pid}/map_files/{line.split()[0]}"
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith(("/dev/shm/", "/memfd:", "/dev/zero")):
                    yield str(link)


class Promises:
    """What is promised, and whether it is kept everywhere."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[str, float, float]]] = {}

    def add(self, what: str, where: str, value: float, bound: float) -> None:
        """:param bound: the most that the value may be; the least, where `what` says so by a `>=`."""
        self._found.setdefault(what, []).append((where, value, bound))

    def print(self) -> None:
        print("\npromised of dtrain" + " " * 49 + "kept in      worst")
        for what, found in self._found.items():
            sign = -1 if ">=" in what else 1
            kept = [sign * value <= sign * bound for _, value, bound in found]
            where, value, _ = max(found, key=lambda one: sign * one[1] / one[2])
            print(f"{what:66} {f'{sum(kept)} of {len(kept)}':9} {value:7.2f} in {where}".rstrip())


def middle(times: list[float]) -> float:
    return statistics.median(times) if times else float("nan")


def print_rounds(o: Options, where: str, figures: Mapping[str, Figures], nbytes: int) -> None:
    limit = figures["limit"]
    copy, write, read = middle(limit.stall), middle(limit.durable), middle(limit.load)
    gb = nbytes / 1e9
    print(f"\n{where}: medians of {o.rounds}; ratios to the limits copy, plain write with fsync, plain read")
    print(f"{'':24}{'stall, ms':>10}{'/ copy':>8}{'durable, s':>12}{'GB/s':>7}{'/ write':>9}", end="")
    print(f"{'load, s':>9}{'GB/s':>7}{'/ read':>8}  {'bytes read by a rank':20}")
    for name, taken in figures.items():
        stall, durable, load = middle(taken.stall), middle(taken.durable), middle(taken.load)
        print(f"{name:24}{1e3 * stall:10.1f}{stall / copy:8.2f}", end="")
        print(f"{durable:12.3f}{gb / durable:7.2f}{durable / write:9.2f}", end="")
        if taken.load:
            print(f"{load:9.3f}{gb / load:7.2f}{load / read:8.2f}", end="")
            print("  " + ", ".join(f"{100 * b / nbytes:.0f}%" for b in taken.read_bytes), end="")
        print(f"  ({taken.remark})" if taken.remark else "", flush=True)


def judge_rounds(o: Options, where: str, figures: Mapping[str, Figures], nbytes: int, promises: Promises) -> None:
    limit, ours = figures["limit"], figures["dtrain"]
    copy, write, read = middle(limit.stall), middle(limit.durable), middle(limit.load)
    stall = middle(ours.stall)
    if wanted(o, "stall"):
        kept = min(middle(figures[name].stall) for name in figures if "kept" in name)
        promises.add("stall / copy <= 1.5", where, stall / copy, 1.5)
        promises.add("stall / async_save's with a stager kept <= 0.6", where, stall / kept, 0.6)
        promises.add("stall / async_save's <= 0.25", where, stall / middle(figures["dcp.async_save"].stall), 0.25)
    if wanted(o, "durable"):
        promises.add("speed of durable save / plain write's >= 0.85", where, write / middle(ours.durable), 0.85)
    if wanted(o, "load"):
        promises.add("speed of load / plain read's >= 0.7", where, read / middle(ours.load), 0.7)
        stock = middle(figures["dcp.save"].load)
        promises.add("speed of load / dcp.load's >= 3", where, stock / middle(ours.load), 3.0)
        if len(ours.read_bytes) > 1 and o.layout == "sharded":
            share = max(ours.read_bytes) * len(ours.read_bytes) / nbytes
            promises.add("bytes read by a rank / its own <= 1.05", where, share, 1.05)


def print_beside(where: str, found: Mapping[str, Beside | None], promises: Promises) -> None:
    print(f"\n{where}: steps of {1e3 * STEP_S:.0f} ms while a save is under way")
    for name, one in found.items():
        text = "saves in the foreground alone"
        if one is not None:
            text = f"{100 * one.slower:6.1f}% slower   save takes {one.save_s:6.2f} s   ({one.steps} steps)"
        print(f"{name:24}{text}", flush=True)
    if (ours := found["dtrain"]) is not None:
        promises.add("slowdown of steps beside a save, % <= 10", where, 100 * ours.slower, 10)


def print_memory(where: str, grown: Mapping[str, int], nbytes: int, ranks: int, promises: Promises) -> None:
    print(f"\n{where}: peak memory beyond the training's own, while saving")
    for name, held in grown.items():
        print(f"{name:24}{held / MIB:8.0f} MiB = {held / nbytes:5.2f} x the state", flush=True)
    bound = 2 * nbytes / MIB + 64 * ranks
    promises.add("peak memory / (two snapshots and 64 MiB a rank) <= 1", where, grown["dtrain"] / MIB / bound, 1.0)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(o: Options) -> None:
    if o.quick:
        o = replace(o, sizes="256", ranks="1", targets="disk", rounds=2, parts=o.parts.replace(",planning", ""))
    if unknown := set(o.parts.split(",")) - set(PARTS):
        sys.exit(f"--parts {','.join(sorted(unknown))}: unknown; choose from {','.join(PARTS)}")
    os.environ |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    began = time.monotonic()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {o.layout} with 2 ranks and more")
    places = {"memory": Path("/dev/shm"), "disk": o.disk}
    roots = {name: Path(tempfile.mkdtemp(prefix="dtrain-benchmark-", dir=place)) for name, place in places.items()}
    promises = Promises()
    try:
        world = World(list(roots.values()))
        for mib, ranks in itertools.product(numbers(o.sizes), numbers(o.ranks)):
            check_room(o, mib)
            nbytes = mib * MIB
            size = f"{mib} MiB, {ranks} rank{'s' if ranks > 1 else ''}"
            if wanted(o, "stall", "durable", "load"):
                for target in o.targets.split(","):
                    figures: dict[str, Figures] = {}
                    for together in turns(mib):
                        found = world.run(ranks, partial(rounds, o, mib, together, target, roots[target]))
                        print_rounds(o, f"{size}, {target}", found, nbytes)
                        figures = found | figures  # dtrain is held against the limits that were measured beside it
                    judge_rounds(o, f"{size}, {target}", figures, nbytes, promises)
            last = o.targets.split(",")[-1]
            if wanted(o, "beside"):
                found = world.run(ranks, partial(beside, o, mib, roots[last]))
                print_beside(f"{size}, {last}", found, promises)
            if wanted(o, "memory"):
                grown = {}
                # The peers' grows with the size, and is measured with the smallest alone.
                names = BRIEFLY if o.quick else ENGINES if mib == min(numbers(o.sizes)) else ("dtrain",)
                for name in names:
                    memory = Memory()
                    work = partial(peak, o, mib, name, roots["disk"])
                    times = world.run(ranks, work, memory.sample)
                    grown[name] = memory.grown(*times)
                print_memory(f"{size}, disk", grown, nbytes, ranks, promises)
        if wanted(o, "planning"):
            print_planning(promises.add, roots["disk"])
        promises.print()
        print(f"\n{time.monotonic() - began:.0f} s in all")
    finally:
        for root in roots.values():
            shutil.rmtree(root, ignore_errors=True)


def available_mib() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) // 1024


def turns(mib: int) -> list[list[str]]:
    """The engines that take turns with each other: all keep their buffers meanwhile, and dtrain two saves."""
    if available_mib() >= 14 * mib:
        return [list(ENGINES)]
    return [[name for name in ENGINES if name not in APART], list(APART)]


def check_room(o: Options, mib: int) -> None:
    if (free := available_mib()) < 10 * mib:
        sys.exit(f"--sizes {mib}: needs {10 * mib} MiB of memory, and {free} are available; choose smaller ones")
    for place, times in ((Path("/dev/shm"), 6), (o.disk, 3)):
        if (room := shutil.disk_usage(place).free // MIB) < times * mib:
            sys.exit(f"--sizes {mib}: needs {times * mib} MiB in {place}, which has {room}; choose smaller ones")


if __name__ == "__main__":
    main(tyro.cli(Options))
