"""The program of a keeper (see `keeper`), of nothing but the standard library: a fork of the supervisor would hold on
to all that was read before `launch`.

    python keeping.py AGENT LISTENER FILES...
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys

_CREDENTIALS = struct.Struct("3i")


def is_ours(connection: socket.socket) -> bool:
    """Whether the other side is a process of this user: anybody may connect to an abstract socket, or make one."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(said)[1] == os.getuid())


def keep(agent: int, listener: int, files: list[int]) -> None:
    """Hand out the files until the agent ends.

    :param agent: its process id.
    :param listener: descriptor of the socket where they are asked for.
    """
    # Nobody is to wait for this process, who reads what the job prints, or learns by a pipe that a supervisor has died.
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in (listener, *files):
            with contextlib.suppress(OSError):
                os.close(descriptor)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)  # the lowest numbers that are free: the standard streams
    with contextlib.suppress(ProcessLookupError), socket.socket(fileno=listener) as asked:
        agents_end = os.pidfd_open(agent)
        while agents_end not in select.select([listener, agents_end], [], [])[0]:
            with contextlib.suppress(OSError):
                asking, _ = asked.accept()
                with asking:
                    if is_ours(asking):
                        socket.send_fds(asking, [str(os.getpid()).encode()], files)


if __name__ == "__main__":
    keep(int(sys.argv[1]), int(sys.argv[2]), [int(file) for file in sys.argv[3:]])
