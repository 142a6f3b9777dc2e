"""`Torchrun`: one torchrun and all the processes below it, from the start to the end of the last one.

    torchrun ── supervisor ── trainer       a rank; what `Torchrun.kill` takes is a trainer

It has a session of its own, so that Ctrl-C reaches the command that started it and nobody else: that command ends
the whole tree in one go. Should the command itself be killed, the tree dies with it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dtrain.elastic.process import die_with

_END_S = 10.0
"""How long the kernel is given to take down processes that were killed."""


class Torchrun:
    """Start a module on several local processes. Its stdout and stderr are those of this process.

    :param module: what each of them runs, as in `python -m`.
    :param arguments: for the module.
    :param nproc: how many.
    :param env: changes to the environment.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, nproc: int, env: dict[str, str]) -> None:
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--standalone", "--nproc-per-node", str(nproc), "-m", module),
                *arguments,
            ],
            # Without a number of threads in the environment, torchrun sets it to 1 and shows a warning.
            env={"OMP_NUM_THREADS": "1"} | dict(os.environ) | env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(die_with, os.getpid()),
        )

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit code, negative for a signal; None if it is still at work after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, pid: int) -> float | None:
        """Kill one of the trainers with SIGKILL.

        :param pid: as the trainer itself has written it down.
        :returns: when, as Unix time in seconds; None if it was gone already.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        try:
            # A number may have passed on to a stranger since. What the descriptor stands for is looked at while it
            # is held, and can't change any more.
            if _parent(_parent(pid)) != self._process.pid:
                return None
            now = time.time()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return now
        except ProcessLookupError:
            return None
        finally:
            os.close(pidfd)

    def end(self) -> None:
        """Kill all that is left of it and wait until it is gone. Nothing happens when it has ended by itself."""
        if self._process.poll() is not None:
            return
        # Stopped from the top down, nobody can start another process behind our back; then all are killed.
        found = {self._process.pid: os.pidfd_open(self._process.pid)}
        while True:
            for pidfd in found.values():
                _send(pidfd, signal.SIGSTOP)
            new = [pid for pid in _children(set(found)) if pid not in found]
            if not new:
                break
            for pid in new:
                try:
                    found[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
        for pidfd in found.values():
            _send(pidfd, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _END_S
        for pidfd in found.values():
            select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
            os.close(pidfd)


def _send(pidfd: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _parent(pid: int) -> int:
    """The process that a process was started by; 0 if there is no such process."""
    try:
        # The second field is the name, in brackets, and may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _children(parents: set[int]) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _parent(pid) in parents]
