"""Processes to measure in, of which nothing is left behind, and the memory that they take."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.elastic.process import Child, fork

MIB = 1 << 20


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
        listener = socket.create_server(("127.0.0.1", 0))
        end, start = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            for rank in range(ranks):
                child = fork(partial(self._rank, rank, ranks, listener, work, start, log.fileno()))
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
            listener.close()
            log.close()
            for root in self._roots:
                for path in root.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @staticmethod
    def _rank(rank: int, ranks: int, listener: socket.socket, work: Callable[..., Any], start: int, log: int) -> int:
        terminal = os.fdopen(os.dup(2), "w")
        os.dup2(log, 2)  # the peers and what they start say much; it is shown when a rank fails
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
            backend = "cpu:gloo,cuda:nccl"
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks)  # as torchrun sets it
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        store = connection(listener if rank == 0 else None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
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


def connection(listener: socket.socket | None = None) -> dist.TCPStore:
    """A connection of its own to the store of this process's world. :param listener: given by who is to serve it."""
    # fmt: off
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=listener is not None,
        wait_for_workers=False, master_listen_fd=None if listener is None else os.dup(listener.fileno()),
    )
    # fmt: on


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


def available_mib() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) // 1024
