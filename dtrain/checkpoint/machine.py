"""The machine that this process runs on: its memory, and who else is there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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


def machine() -> str:
    """Tells machines apart, and containers, whose processes can't see each other's memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
