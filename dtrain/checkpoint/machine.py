"""The machine and the process that this runs in: memory, and who else is there."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

_SPARE_BYTES = 256 << 20
"""Memory that is left to everybody else."""


def available_bytes() -> int:
    """Memory that this process can still have: the machine's, or what its container is left with."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no limit here: the file isn't there, or says "max"
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            limit = int((folder / "memory.max").read_text())
            free = min(free, limit - used + int(statistics["inactive_file"]))
    return free


def free_bytes() -> int:
    """What of it may be taken."""
    return available_bytes() - _SPARE_BYTES


def machine() -> str:
    """Tells machines apart, and containers, whose processes can't see each other's memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: for what makes many objects at once, none of which is garbage.

    A full collection takes a large process a tenth of a second and more.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
