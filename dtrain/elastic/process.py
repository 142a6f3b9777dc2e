"""Forking and dying together.

A fork of a process that has imported torch is at work within milliseconds, where a fresh one needs seconds. It is safe
as long as the parent has no other Python thread and no CUDA context, and every child dies with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from dtrain.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_THREADS_AT_IMPORT = len(os.listdir("/proc/self/task"))
"""Those of the BLAS libraries, which prepare themselves for a fork."""
_libc = ctypes.CDLL(None, use_errno=True)
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask for the end. torchrun's agent passes on what it gets itself of these."""
_HELD = {signal.SIGINT, *ENDING}
"""Signals that a parent may read in its own way."""


class Child:
    """A forked process. Use `fork` to make one.

    :ivar pid: its process id.
    :ivar pidfd: readable as soon as the process has ended.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._code: int | None = None

    @property
    def running(self) -> bool:
        """Whether nobody has waited for its end yet."""
        return self._code is None

    def kill(self) -> int:
        """End it now, if it hasn't ended by itself; returns as `wait` does."""
        if self._code is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end. :returns: its exit code; -n if signal n ended it."""
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
        return self._code


def fork(work: Callable[[], int], name: str = "", *, apart: bool = False, outlives: bool = False) -> Child:
    """Run `work` in a fork of this process, which ends with the exit code that it returns.

    :param name: what the process is called by `top` and `ps -o comm`, at most 15 letters.
    :param apart: in a process group of its own, which doesn't get the signals that are sent to that of its parent.
    :param outlives: in a session of its own, and not killed when its parent dies, as others are.

    The child doesn't react to Ctrl-C: the parent decides what that means.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Python 3.12 and later warn of any thread. `check_can_fork` has looked at those of Python; what is left are
        # the pools of the BLAS libraries, which prepare themselves for a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        with held() as mask:
            pid = os.fork()
            if pid == 0:
                return _child(work, name, parent, mask, apart=apart, outlives=outlives)
    return Child(pid)


@contextlib.contextmanager
def held() -> Iterator[set[int]]:
    """Have the signals that ask for the end wait, for this process and those that it starts: until a new process has
    handlers of its own, they would run its parent's in it, or kill it.

    :returns: the signals that were held before.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def held_through_fork(in_child: Callable[[], None]) -> None:
    """From here on, `in_child` runs in each process that is forked from this one by whomever, before a signal that asks
    for the end can reach it. Without that, Python drops one that is there first, or runs this process's handler."""
    before = threading.local()  # several threads may fork

    def hold() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def begin() -> None:
        in_child()
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=begin)


def _child(work: Callable[[], int], name: str, parent: int, mask: set[int], *, apart: bool, outlives: bool) -> NoReturn:
    """The rest of a new process's life. :param mask: see `held`."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask - _HELD)
        if outlives:
            os.setsid()
        else:
            die_with(parent)
        if apart:
            os.setpgid(0, 0)
        if name:
            _libc.prctl(_PR_SET_NAME, name.encode())
        # What the parent's modules registered is the parent's to run; what the child registers runs at its end.
        atexit._clear()
        code = work()
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the child's own threads, as exit would
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def ignore_ending() -> None:
    """Leave it to others to say when this process is not needed any more: signals may be sent to all of a job."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, however that happens.

    :param parent: the id of the process that started this one.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def alive_s(pid: int) -> float:
    """How long a process has been there, in seconds."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def check_can_fork() -> None:
    """:raises ConfigError: a thread or a CUDA context would break the forked trainers."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        raise ConfigError(
            f"threads were started before dtrain.launch ({', '.join(threads)}): a forked trainer could hang. Start "
            "them inside main, or run without supervision by launch(..., in_place=True)"
        )
    if len(os.listdir("/proc/self/task")) > _THREADS_AT_IMPORT:
        raise ConfigError(
            "native threads were started after the import of dtrain and before dtrain.launch, and a forked trainer "
            "would wait for them for ever. Most often it was an import of scipy, which torchmetrics and scikit-learn "
            "bring along: import these before dtrain, or inside main. Or it was an operation of torch on a large "
            "tensor: move it into main, use numpy for it, or set OMP_NUM_THREADS=1 (as torchrun does)"
        )
    if torch.cuda.is_initialized():
        raise ConfigError(
            "CUDA was used before dtrain.launch, and a forked trainer could not use it any more. Create models and "
            "tensors on the GPU inside main, or run without supervision by launch(..., in_place=True)"
        )
