"""`Keeper`: keeps a rank's snapshots when its supervisor ends, for the one that torchrun starts in its place.

    agent ─┬─ supervisor ┄ forks ┄▶ keeper    holds the slots' files, and nothing else; one for each local rank
           └─ the next supervisor ─ asks ──▶  gets them by its socket (SCM_RIGHTS)

torchrun ends all supervisors when one of them dies, when a node is lost and when one comes back. The keeper is found by
an abstract socket, which goes away with it, and it ends with torchrun's agent, or when the run has.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct

from dtrain.checkpoint.slots import Slots
from dtrain.elastic.placement import Placement
from dtrain.elastic.process import fork

_MOST_FILES, _MOST_DIGITS = 16, 20
_CREDENTIALS = struct.Struct("3i")
_PATIENCE_S = 5.0


class Keeper:
    """One rank's, as its supervisor sees it. Without torchrun there is none, and nothing is kept.

    :param run: tells the run from others of the same agent.
    :param replicate: see `Slots`.
    :ivar slots: those that were kept, or new ones.
    """

    def __init__(self, placement: Placement, run: str, *, replicate: bool) -> None:
        self._pid = 0
        if placement.store is None:
            self.slots = Slots(replicate=replicate)
            return
        agent = os.getppid()
        name = f"\0dtrain/{os.getuid()}/{agent}/{run}/{placement.local_rank}"
        files = self._ask(name)
        self.slots = Slots(replicate=replicate, files=files)
        if files and bool(self.slots.replicas) == replicate:
            return
        self.end()
        self.slots = Slots(replicate=replicate)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen()
            self._pid = fork(lambda: _keep(listener, agent, self.slots.files), "dtrain-keeper", outlives=True).pid

    def _ask(self, name: str) -> list[int]:
        """The files that an earlier supervisor has left; empty if there are none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(_PATIENCE_S)
            try:
                asking.connect(name)
                if not _is_ours(asking):
                    return []
                pid, files, _, _ = socket.recv_fds(asking, _MOST_DIGITS, _MOST_FILES)
            except OSError:  # there is none, most often
                return []
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


def _keep(listener: socket.socket, agent: int, files: list[int]) -> int:
    """The keeper's life."""
    # Nobody is to wait for this process, who reads what the job prints, or learns by a pipe that a supervisor has died.
    needed = {*files, listener.fileno()}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in needed:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)  # the lowest numbers that are free: the standard streams
    try:
        agents_end = os.pidfd_open(agent)
    except ProcessLookupError:
        return 0
    while True:
        ready, _, _ = select.select([listener.fileno(), agents_end], [], [])
        if agents_end in ready:
            return 0
        with contextlib.suppress(OSError):
            asking, _ = listener.accept()
            with asking:
                if _is_ours(asking):
                    socket.send_fds(asking, [str(os.getpid()).encode()], files)


def _is_ours(connection: socket.socket) -> bool:
    """Whether the other side is a process of this user: anybody may connect to an abstract socket, or make one."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(said)[1] == os.getuid())
