"""Saving and restoring without a training loop, for the tests of checkpoints."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.channel import Client, Direct, Remote, send, serve
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.manager import Manager, Restored
from dtrain.checkpoint.saver import Saver as WritingSaver
from dtrain.checkpoint.slots import Slots
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State
from dtrain.config import Config
from dtrain.elastic.process import Child, fork
from dtrain.observe.events import EVENTS, Events, read_lines
from dtrain.storage.local import LocalStorage


class Kept:
    """A user's object: keeps what it is given."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


class Saver:
    """One generation that has claimed a run folder, its savers being the ranks themselves. All ranks must make it.

    :param slots: that another one has left.
    """

    def __init__(self, root: Path, keep_last: int = 3, slots: Slots | None = None, **objects: Any) -> None:
        storage, events = LocalStorage(str(root)), Events(str(root))
        storage.prepare()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        config = Config(dir=str(root), global_batch=1, micro_batch=1, keep_last=keep_last, timeout_s=30)
        self.slots = slots or Slots()
        snapshots = Snapshots(
            self.slots,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
            generation=0,
            spill=str(root),
            say=events.warn,
        )

        self.saver = WritingSaver.of(config, connection(), rank, world_size, self.slots)
        self.manager = Manager([storage], self._client(), self.slots, snapshots, events)
        self.catalog = self.saver._catalogs[0]
        self.manager.claim()
        self.state = State()
        self.state.track(objects)

    def _client(self) -> Client:
        return Direct(self.saver, self.slots.board)

    def save(self, step: int, metrics: dict[str, float] | None = None) -> None:
        self.manager.save(self.state, step, {"step": step}, metrics)
        self.manager.wait()

    def restore(self) -> Restored | None:
        return self.manager.restore(self.state)


class Background(Saver):
    """The same with a process for each saver, which can be stopped, killed and replaced."""

    def _client(self) -> Client:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = self._fork()
        return Remote(self._ours, self.slots.board, 0)

    def _fork(self) -> Child:
        def work() -> int:
            serve(self._theirs, self.saver, self.slots.board)
            return 0

        return fork(work)

    def replace(self) -> None:
        """Kill the process, and put another one in its place, as a supervisor does."""
        self.process.kill()
        self.process = self._fork()

    def begin(self, step: int) -> None:
        """Have a step saved, and don't wait for it."""
        self.manager.save(self.state, step, {"step": step})

    def end(self) -> int:
        """Let the process finish what it is at. :returns: its exit code."""
        send(self._ours, do="end")
        return self.process.wait()


def connection() -> Callable[[], dist.Store]:
    """What connects this group of savers to a store, below a prefix that is theirs alone. All ranks must reach it."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name)
    return lambda: dist.PrefixStore(f"savers/{name[0]}", dist.distributed_c10d._get_default_store())


def save(root: Path, step: int = 1, **objects: Any) -> None:
    Saver(root, **objects).save(step)


def restore(root: Path, **objects: Any) -> int | None:
    """The step that was restored; None if there is none."""
    restored = Saver(root, **objects).restore()
    return None if restored is None else restored.step


def round_trip(root: Path, value: Any) -> Any:
    """What a user's object gets back of `value`, in a new generation."""
    save(root, kept=Kept(value))
    kept = Kept()
    assert restore(root, kept=kept) == 1
    return kept.value


def log_of(root: Path) -> Log:
    log = Log(LocalStorage(str(root)))
    log.refresh()
    return log


def delete(root: Path, step: int) -> None:
    """As a run does it that goes on; nothing if it has done so."""
    if step in commits(root):
        log, folder = log_of(root), folder_of(root, step)
        log.claim(0.0, "x")
        log.append(Entry(kind="retire", epoch=log.epoch, time=0.0, step=step, attempt=folder.name))
        shutil.rmtree(folder)


def condemn_all(root: Path) -> None:
    """As a start does it that can't read any checkpoint."""
    log = log_of(root)
    log.claim(0.0, "x")
    for commit in log.commits():
        log.append(replace(commit, kind="bad", epoch=log.epoch, reason="away"))


def commits(root: Path) -> list[int]:
    return [entry.step for entry in log_of(root).commits()]


def bad(root: Path) -> list[Entry]:
    return [entry for entry in log_of(root).entries if entry.kind == "bad"]


def folder_of(root: Path, step: int) -> Path:
    """The folder of the newest attempt at a step."""
    entry = [e for e in log_of(root).entries if e.kind == "commit" and e.step == step][-1]
    return root / CHECKPOINTS / entry.attempt


def warnings(root: Path) -> list[str]:
    return [line["message"] for line in read_lines(root / EVENTS) if line["event"] == "warning"]


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two trees differ in type, shape or any bit."""
    if type(one) is not type(other):
        yield f"{at}: {type(one)} and {type(other)}"
    elif isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape) or bits(one) != bits(other):
            yield f"{at}: {one} and {other}"
    elif isinstance(one, np.ndarray | np.generic):
        if (one.dtype, one.shape) != (other.dtype, other.shape) or one.tobytes() != other.tobytes():
            yield f"{at}: {one!r} and {other!r}"
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{at}: the keys {list(one)} and {list(other)}"
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{at}: {len(one)} and {len(other)} items"
        for index, (a, b) in enumerate(zip(one, other, strict=False)):
            yield from differences(a, b, f"{at}.{index}")
    elif isinstance(one, set | frozenset):
        if one != other:
            yield f"{at}: {one} and {other}"
    elif repr(one) != repr(other):  # nan is not equal to itself, and 0.0 is to -0.0
        yield f"{at}: {one!r} and {other!r}"


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
