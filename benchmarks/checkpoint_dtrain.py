"""dtrain, as `checkpoint.py` measures it: the engine below a run, without the training loop."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpoint_peers import Training
from checkpoint_world import connection

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.channel import Remote, send, serve
from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.reader import load_tensors, read_manifest
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Slots
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State
from dtrain.checkpoint.tree import flatten
from dtrain.config import Config
from dtrain.elastic.process import fork
from dtrain.observe.events import Events


class Dtrain:
    """dtrain's own row: the engine as it runs under a supervisor, a process for each rank's saver.

    :param place: of the run folder, which is a path or a URL.
    :param options: more of them, for the config.
    """

    def __init__(self, training: Training, place: Path | str, **options: Any) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        config = Config(dir=str(place), global_batch=1, micro_batch=1, keep_last=2, **options)
        self._storage, events = config.storage(), Events(config.local_dir)
        self._state = State()
        self._state.track({"model": training.model, "optimizer": training.optimizer})
        self._slots, self._step = Slots(), 0
        snapshots = Snapshots(
            self._slots,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
            generation=0,
            spill=config.local_dir,
            say=events.warn,
        )
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)

        def connect() -> dist.Store:
            return dist.PrefixStore(f"savers/{name[0]}", connection())

        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def work() -> int:
            os.nice(15)  # as a supervisor does it
            serve(theirs, Saver.of(config, connect, rank, world_size, self._slots), self._slots.board)
            return 0

        self._process = fork(work)
        client = Remote(self._ours, self._slots.board, 0)
        self._manager = Manager([self._storage], client, self._slots, snapshots, events)
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
