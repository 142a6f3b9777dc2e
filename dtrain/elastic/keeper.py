"""`Keeper`: keeps a rank's snapshots when its supervisor ends, for the one that torchrun starts in its place.

    agent ─┬─ supervisor ┄ starts ┄▶ keeper    holds the slots' files, and nothing else; one for each local rank
           └─ the next supervisor ─ asks ──▶   gets them by its socket (SCM_RIGHTS)

torchrun ends all supervisors when one of them dies, when a node is lost and when one comes back. The keeper is found by
an abstract socket, which goes away with it, and it ends with torchrun's agent, or when the run has.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from dtrain.checkpoint.machine import machine
from dtrain.checkpoint.slots import Slots
from dtrain.elastic import keeping
from dtrain.elastic.placement import Placement
from dtrain.elastic.process import fork

_MOST_FILES, _MOST_DIGITS = 16, 20
_PATIENCE_S = 5.0


class Keeper:
    """One rank's, as its supervisor sees it. Without torchrun there is none, and nothing is kept.

    :param run: tells the run from others of the same agent.
    :param replicate: see `Slots`.
    :param say: told if there can be none.
    :ivar slots: those that were kept, or new ones.
    """

    def __init__(self, placement: Placement, run: str, *, replicate: bool, say: Callable[[str], None]) -> None:
        self._pid = 0
        if placement.store is None:
            self.slots = Slots(replicate=replicate)
            return
        agent = os.getppid()
        # Containers may share a network, and with it these names, but not the numbers of processes.
        where = hashlib.sha256(machine().encode()).hexdigest()[:16]
        name = f"\0dtrain/{os.getuid()}/{where}/{agent}/{run}/{placement.local_rank}"
        files = self._ask(name)
        if files:
            self.slots = Slots(files=files)
            if bool(self.slots.replicas) == replicate:
                return
            for file in files:
                os.close(file)
            self.end()
        self.slots = Slots(replicate=replicate)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(name)
                listener.listen()
                self._pid = self._start(agent, listener.fileno())
        except OSError as error:
            say(f"rank {placement.rank}: nobody can keep its snapshots in memory for the next process: {error}")

    def _start(self, agent: int, listener: int) -> int:
        def work() -> int:
            needed = [listener, *self.slots.files]
            for file in needed:
                os.set_inheritable(file, True)
            program = [sys.executable, "-I", "-S", str(Path(keeping.__file__)), str(agent), *map(str, needed)]
            os.execv(sys.executable, program)

        return fork(work, "dtrain-keeper", outlives=True).pid

    def _ask(self, name: str) -> list[int]:
        """The files that an earlier supervisor has left; empty if there are none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(_PATIENCE_S)
            try:
                asking.connect(name)
                if not keeping.is_ours(asking):
                    return []
                pid, files, _, _ = socket.recv_fds(asking, _MOST_DIGITS, _MOST_FILES)
            except OSError:  # there is none, most often
                return []
        for file in files:
            os.set_inheritable(file, False)
        self._pid = int(pid or 0)
        return files

    def end(self) -> None:
        """The run is at its end, and nothing of it will be wanted."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(self._pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _PATIENCE_S)  # its socket is gone then
                os.close(pidfd)
        self._pid = 0
