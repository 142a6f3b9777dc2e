"""`Signals`: signals as something that can be waited for, with who has sent them.

A handler may run at any moment, in the middle of a request to the store as well, where nothing can be done. Read from
a descriptor (signalfd), a signal is handled where the process waits anyway, and it says which process it came from:
torchrun's agent, which ends the processes of a group that it will start again, or somebody else, who wants the end of
the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
from collections.abc import Collection

_libc = ctypes.CDLL(None, use_errno=True)
_SET_BYTES = 128
_INFO_BYTES = 128


class Signals:
    """From here on, these signals don't disturb the process: they are read.

    :ivar descriptor: readable when there is one.
    """

    def __init__(self, numbers: Collection[signal.Signals]) -> None:
        self._numbers = set(numbers)
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        bits = sum(1 << (number - 1) for number in numbers)
        self.descriptor = _libc.signalfd(-1, bits.to_bytes(_SET_BYTES, "little"), os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "signalfd")

    def read(self) -> tuple[signal.Signals, int] | None:
        """The next one, with the id of the process that has sent it; None if there is none."""
        with contextlib.suppress(BlockingIOError):
            number, _, _, sender = struct.unpack_from("=IiiI", os.read(self.descriptor, _INFO_BYTES))
            return signal.Signals(number), sender
        return None

    def wait(self, descriptor: int, timeout_s: float) -> bool:
        """Wait until `descriptor` is readable, or a signal is there. :returns: whether it was the former."""
        return descriptor in select.select([descriptor, self.descriptor], [], [], timeout_s)[0]

    def close(self) -> None:
        """Have them treated as before. One that wasn't read does now what it always did."""
        os.close(self.descriptor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
