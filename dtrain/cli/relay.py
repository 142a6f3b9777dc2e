"""A wire that is slow: passes on what comes in at one network device to another, both ways, after a while.

    python relay.py DEVICE DEVICE SECONDS

It does what the kernel's netem does, which not every kernel has. It is started as a file, not as a module, inside a
network namespace: so it takes no import of torch, and begins at once.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections import deque

_ALL = 0x0003
"""ETH_P_ALL: frames of all protocols."""
_SOL_PACKET = 263
_VNET_HDR = 15
"""Frames come with what the kernel hasn't done to them yet: a checksum, a cut into packets. It goes on with them."""
_IGNORE_OUTGOING = 23
_FRAME_BYTES = 1 << 17
_BUFFER_BYTES = 1 << 24


def relay(first: str, second: str, delay_s: float) -> None:
    """Never returns."""
    ends = [_opened(first), _opened(second)]
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], timeout_s)[0]:
            with contextlib.suppress(OSError):  # the device is down, and so is the wire
                under_way.append((time.monotonic() + delay_s, ends[end is ends[0]], end.recv(_FRAME_BYTES)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, to, frame = under_way.popleft()
            with contextlib.suppress(OSError):
                to.send(frame)


def _opened(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)  # of no protocol yet: nothing comes in before it is bound
    end.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    end.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, buffer, _BUFFER_BYTES)
    end.bind((device, _ALL))
    return end


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]))
