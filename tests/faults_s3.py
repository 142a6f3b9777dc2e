"""Every fault at every request of a save, of a restore and of a gc: does it succeed, or fail with nothing lost?

    python -m tests.faults_s3                           all of it; exits with 1 if a case goes wrong
    python -m tests.faults_s3 --sample 40 --seed 3      so many of the cases, by chance
    python -m tests.faults_s3 --random 20 --seed 3      so many cases with a fault in every fifth request

It starts a server of its own. Each case has a run folder of its own, whose steps 1 and 2 are
committed without a fault. After the fault, a reader that saw nothing of it has to find a commit that is whole, the
right bits in it, and none lost that was reported. A case that takes longer than its deadline is a hang.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

from dtrain.checkpoint.channel import Direct
from dtrain.checkpoint.loading import load
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Slots
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State
from dtrain.cli import leftovers
from dtrain.config import Config
from dtrain.errors import SaveError
from dtrain.observe.events import Events
from dtrain.storage.base import Storage
from tests.fault_proxy import FAULTS, Fault, Proxy
from tests.s3_server import BUCKET, seaweed

TIMEOUT_S = 1.5
"""How long a request is tried again in these runs."""
DEADLINE_S = 30.0
"""Of a case. A save is a dozen requests one after the other, and after one that has failed for good it cleans up."""
_ELEMENTS = 70_000


class Value:
    """What is saved: a step's own bits."""

    def __init__(self, step: int = 0) -> None:
        self.tensor = torch.full((_ELEMENTS,), float(step))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor = state["tensor"]


class Generation:
    """One that has claimed a run and saves in its own process."""

    def __init__(self, config: Config) -> None:
        local = config.local_dir
        os.makedirs(local, exist_ok=True)
        store = dist.PrefixStore(uuid.uuid4().hex, dist.distributed_c10d._get_default_store())
        slots, events = Slots(), Events(local)
        snapshots = Snapshots(
            slots, rank=0, world_size=1, local_world_size=1, generation=0, spill=local, say=lambda _: None
        )
        saver = Saver.of(config, lambda: store, 0, 1, slots)
        self.manager = Manager([config.storage()], Direct(saver, slots.board), slots, snapshots, events)
        self.manager.claim()

    def save(self, step: int) -> None:
        state = State()
        state.track({"value": Value(step)})
        self.manager.save(state, step, {"step": step})
        self.manager.wait()

    def restore(self) -> int:
        state, value = State(), Value()
        state.track({"value": value})
        restored = self.manager.restore(state)
        assert restored is not None
        assert torch.equal(value.tensor, Value(restored.step).tensor), f"step {restored.step} has wrong bits"
        return restored.step


def config_of(root: str, local: str, url: str) -> Config:
    """Of a run on the server at a URL."""
    options = {"endpoint_url": url, "timeout_s": TIMEOUT_S}
    return Config(
        dir=root, local_dir=local, storage_options=options, global_batch=1, micro_batch=1, keep_last=2, timeout_s=60
    )


def read_newest(config: Config) -> int:
    """The step of the newest checkpoint, after a look at all of its bits."""
    value = Value()
    with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": config.storage_options["endpoint_url"]}):
        loaded = load(config.dir, {"value": value})
    assert torch.equal(value.tensor, Value(loaded.step).tensor), f"step {loaded.step} has wrong bits"
    return loaded.step


class Case:
    """A run folder with two good steps, and somebody at work on it whose requests go through a proxy."""

    def __init__(self, server: str, proxy: Proxy, bucket: str, folder: Path) -> None:
        self.root = f"s3://{bucket}/faults-{uuid.uuid4().hex}"
        self._server, self._proxy, self._local = server, proxy, str(folder / uuid.uuid4().hex)
        self.generation = Generation(self._config(proxy.url))
        for step in (1, 2):
            self.generation.save(step)

    def _config(self, url: str) -> Config:
        return config_of(self.root, self._local, url)

    def committed(self) -> list[int]:
        """The steps that a reader finds, which has nothing to do with the one at work. The newest is read."""
        config = self._config(self._server)
        log = Log(config.storage())
        log.refresh()
        assert not log.broken, log.broken
        steps = [entry.step for entry in log.commits()]
        assert read_newest(config) == steps[-1]
        return steps

    def save(self) -> str:
        """Step 3, with the fault; then step 4, without one."""
        outcome = "saved"
        try:
            self.generation.save(3)
        except SaveError:
            outcome = "failed"
        self._proxy.disarm()
        steps = self.committed()
        assert steps[-1] == 3 or (outcome == "failed" and steps[-1] == 2), f"{outcome}, and there are {steps}"
        assert len(steps) >= 2, f"only {steps} left"
        try:
            self.generation.save(4)
        except SaveError as error:
            raise AssertionError(f"{outcome}, and the next save failed as well: {error}") from error
        assert self.committed()[-1] == 4
        return outcome

    def many(self, dice: random.Random) -> str:
        """Five saves while a fifth of all requests go wrong, in any way; then one without a fault."""
        saved = [2]
        self._proxy.arm_by_chance(dice, 0.2)
        for step in range(3, 8):
            try:
                self.generation.save(step)
                saved.append(step)
            except SaveError:
                pass
        self._proxy.disarm()
        steps = self.committed()
        assert steps[-1] >= saved[-1], f"{saved} were saved, and there are {steps}"
        self.generation.save(8)
        assert self.committed()[-1] == 8
        return f"saved {len(saved) - 1} of 5"

    def restore(self) -> str:
        """A new generation claims the run and restores, with the fault; then another one, without."""
        outcome = "restored"
        try:
            assert Generation(self._config(self._proxy.url)).restore() == 2
        except OSError:
            outcome = "failed"
        self._proxy.disarm()
        assert self.committed() == [1, 2]
        assert Generation(self._config(self._proxy.url)).restore() == 2
        return outcome

    def gc(self) -> str:
        """Leftovers of an earlier epoch, and the fault while they are looked for and deleted."""
        outcome = "done"
        config = self._config(self._proxy.url)

        def open_run(_: str, options: Sequence[str]) -> tuple[Storage, Log]:
            log = Log(storage := config.storage())
            log.refresh()
            return storage, log

        with mock.patch.object(leftovers, "open_run", open_run), redirect_stdout(io.StringIO()):
            try:
                leftovers.Gc(folder=self.root, grace="0.001s", delete=True).run()
            except OSError:
                outcome = "failed"
        self._proxy.disarm()
        assert self.committed() == [1, 2]
        return outcome

    def leave_something(self) -> None:
        """What a process that was killed has left, for gc to find."""
        storage = self._config(self._server).storage()
        for name in ("step-00000009.e0.aaaaaaaa", "step-00000009.e0.bbbbbbbb"):
            with storage.open_new(f"checkpoints/{name}/__0_0.distcp") as sink:
                sink.write(b"left over")


ACTS: dict[str, Callable[[Case], str]] = {"save": Case.save, "restore": Case.restore, "gc": Case.gc}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", default="save,restore,gc", help="of these")
    parser.add_argument("--faults", default=",".join(FAULTS), help="of these")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, by chance; 0 is all")
    parser.add_argument("--random", type=int, default=0, help="so many saves with many faults instead")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    dice = random.Random(chosen.seed)
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong: list[str] = []
    with (
        TemporaryDirectory() as folder,
        seaweed(Path(folder) / "server") as server,
        Proxy(server.url) as proxy,
        alone(),
    ):
        os.environ.update(server.environment)

        def case() -> Case:
            return Case(server.url, proxy, BUCKET, Path(folder))

        if chosen.random:
            for number in tqdm(range(chosen.random), disable=None):
                try:
                    counts["by chance", "20% of all", case().many(random.Random(chosen.seed + number))] += 1
                except Exception as error:
                    wrong.append(f"seed {chosen.seed + number}: {type(error).__name__}: {error}")
                    print(wrong[-1], flush=True)
        cases: list[tuple[str, Fault, int, str]] = []
        for act in () if chosen.random else chosen.acts.split(","):
            requests = _requests_of(act, case(), proxy)
            print(f"{act}: {len(requests)} requests", flush=True)
            cases += [
                (act, fault, number, request)
                for number, request in enumerate(requests, start=1)
                for fault in FAULTS
                if fault in chosen.faults.split(",")
            ]
        for act, fault, number, request in tqdm(
            dice.sample(cases, chosen.sample) if chosen.sample else cases, disable=None
        ):
            ready = case()
            if act == "gc":
                ready.leave_something()
            proxy.arm(fault, number)
            started = time.monotonic()
            try:
                outcome = ACTS[act](ready)
            except Exception as error:
                outcome = "WRONG"
                wrong.append(f"{act}, {fault} at request {number} ({request}): {type(error).__name__}: {error}")
                print(wrong[-1], flush=True)
            finally:
                proxy.disarm()
            if (took := time.monotonic() - started) > DEADLINE_S:
                wrong.append(f"{act}, {fault} at request {number} ({request}): took {took:.0f} s")
                print(wrong[-1], flush=True)
            counts[act, fault, outcome] += 1
    for act, kind in dict.fromkeys((act, fault) for act, fault, _ in counts):
        outcomes = [f"{count} {outcome}" for (a, f, outcome), count in counts.items() if (a, f) == (act, kind)]
        print(f"{act:8} {kind:16} {', '.join(outcomes)}")
    print(f"{sum(counts.values())} cases; {len(wrong)} went wrong")
    return int(bool(wrong))


def _requests_of(act: str, case: Case, proxy: Proxy) -> list[str]:
    """What an act asks of the server when nothing happens to it."""
    if act == "gc":
        case.leave_something()
    proxy.arm()
    asked: list[str] = []
    disarm = proxy.disarm

    def disarmed() -> tuple[list[str], bool]:
        if not asked:
            asked.extend(disarm()[0])
        return disarm()

    proxy.disarm = disarmed  # type: ignore[method-assign]
    try:
        ACTS[act](case)
    finally:
        proxy.disarm = disarm  # type: ignore[method-assign]
    return asked


@contextmanager
def alone() -> Iterator[None]:
    """The only rank of a group."""
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
