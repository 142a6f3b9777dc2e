"""What a checkpoint costs: dtrain beside the machine's own limits, beside stock DCP and beside torch_checkpointing.

All save and load the same state: a GPT's 196 parameter tensors, the two moments that AdamW keeps of each, and its step
counts. With two ranks and more it is sharded by FSDP2, so that each writes its part; `--layout replicated` gives every
rank all of it, as under DDP. All take turns in the same processes, with the limits between them, so that whatever else
the machine does falls on all; a figure is the median of the rounds, and of several ranks the slowest one counts.

- stall: from the call of save until weights may change again, the building of the state dict counted in. The limit
  is a copy of the rank's bytes into memory that is warm, by one thread.
- durable: from the call until all ranks' bytes are synced. The limit is a plain write with fsync, a file a rank.
- load: into the training's own tensors. The limit is a plain read. Files are in the page cache for all: dtrain's
  writes go past it, so everybody's files are read before, those of the limit too.
- beside: how much slower steps of 50 ms become while a save is under way.
- memory: the peak beyond the training's own while saving to disk, of all processes: anonymous memory, memory that
  they share, and files in tmpfs.
- planning: up to 4,096 ranks that are only simulated, see `checkpoint_planning.py`.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --quick               under a minute: 256 MiB, one rank, one target
    python benchmarks/checkpoint.py --disk /data --parts stall,durable
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import tyro
from checkpoint_dtrain import Dtrain
from checkpoint_options import PARTS, Options
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
from checkpoint_report import Beside, Figures, Promises, judge_rounds, print_beside, print_memory, print_rounds
from checkpoint_world import MIB, Memory, World, available_mib

T = TypeVar("T")

STEP_S = 0.05
SETTLE_S = 0.5
"""Before a load, for what engines do after a save that nobody waits for, such as to delete an older one."""


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
            for place, (name, engine) in enumerate(engines.items()):
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
                if name in LOADS and self._o.wanted("load"):
                    time.sleep(SETTLE_S)
                    if dist.get_rank() == 0:
                        warm(*(root / str(place)).rglob("*"))
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
            warm(plain)
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


def warm(*paths: Path) -> None:
    """Have files in the page cache, however they were written.

    Each is read twice, after which the kernel leaves its pages where they are: to take them among those in use costs
    more than to read them, and would fall on whoever happens to be the second.
    """
    for path in 2 * paths:
        # An older checkpoint may be deleted at this moment.
        with suppress(FileNotFoundError), path.open("rb", buffering=0) if path.is_file() else nullcontext() as file:
            while file is not None and file.read(16 * MIB):
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
            if o.wanted("stall", "durable", "load"):
                for target in o.targets.split(","):
                    for together in turns(mib):
                        found = world.run(ranks, partial(rounds, o, mib, together, target, roots[target]))
                        print_rounds(o, f"{size}, {target}", found, nbytes)
                        if "dtrain" in found:  # held against what was measured beside it
                            judge_rounds(o, f"{size}, {target}", found, nbytes, promises)
            last = o.targets.split(",")[-1]
            if o.wanted("beside"):
                found = world.run(ranks, partial(beside, o, mib, roots[last]))
                print_beside(f"{size}, {last}", found, promises)
            if o.wanted("memory"):
                grown = {}
                # The peers' grows with the size, and is measured with the smallest alone.
                names = BRIEFLY if o.quick else ENGINES if mib == min(numbers(o.sizes)) else ("dtrain",)
                for name in names:
                    memory = Memory()
                    work = partial(peak, o, mib, name, roots["disk"])
                    times = world.run(ranks, work, memory.sample)
                    grown[name] = memory.grown(*times)
                print_memory(f"{size}, disk", grown, nbytes, ranks, promises)
        if o.wanted("planning"):
            print_planning(promises.add, roots["disk"])
        promises.print()
        print(f"\n{time.monotonic() - began:.0f} s in all")
    finally:
        for root in roots.values():
            shutil.rmtree(root, ignore_errors=True)


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
