"""`Watchdog`: notices that a trainer doesn't come further, and finds out who is to blame.

A rank that hangs holds up all the others, so from outside all of them look alike: none leaves a mark (see `page`). Each
supervisor watches its own trainer. One whose trainer is silent for too long says so in the store, with a report of
where it is; as long as anybody still comes further, it is being waited for, and that is no hang. The last one to fall
silent compares the reports: whoever has got the least far is what the others are waiting for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.elastic.page import Page, Phase

TICK_S = 1.0
"""How often a trainer is looked at."""
_MANY_TIMES = 10
"""Longer than the longest silence of late, and than the limit before the first step is done."""
_UNWATCHED = (Phase.MAIN, Phase.RESTORE)
"""How long these take, nobody can tell; and what the ranks do together there ends after `timeout_s`."""
_SLOW = (Phase.VALIDATION, Phase.SAVE, Phase.END)
"""Storage may take its time, and a validation begins with a batch of another size."""
_ASLEEP_S = 5.0
"""A supervisor that wasn't run for so long was stopped together with its trainer, or had no processor."""
_DUMP_S = 1.0
_ALL_DUMPS_S = 3.0
_DUMP_SIGNAL = signal.SIGRTMIN + 9
_REPORT_BYTES = 60_000
_PACKAGE = Path(__file__).parent.parent
_OWN = (f"{_PACKAGE}/training/", f"{_PACKAGE}/checkpoint/")
_WAITING = ("/torch/distributed/", "/torch/autograd/graph.py", "/torch/nn/parallel/", *_OWN)
"""Where a rank is that waits for others, by the file of its innermost frame."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a silent trainer is."""

    rank: int
    host: str
    pid: int
    step: int
    """The one that is under way; in the end, the last one; 0 otherwise outside of the steps."""
    micro_batch: int
    left: int
    """Micro-batches that it still has to finish in the step."""
    phase: int
    silent_s: float
    state: str
    """As in /proc: T is stopped by a signal, R runs, S waits."""
    stacks: str
    """Of all Python threads, in the form of `faulthandler`; empty if the process couldn't say."""

    @property
    def place(self) -> str:
        """One line."""
        if self.state == "-":
            return f"rank {self.rank} has come to the end of main"
        step = f" of step {self.step}" if self.step and self.phase != Phase.END else ""
        batch = f", micro-batch {self.micro_batch}" if self.step and self.micro_batch >= 0 else ""
        stopped = ", stopped by a signal" if self.state == "T" else ""
        return (
            f"rank {self.rank} ({self.host}, process {self.pid}) has been in {Phase(self.phase).text}{step}{batch} for "
            f"{self.silent_s:.0f} s{stopped}"
        )

    @property
    def waits(self) -> bool:
        """Whether it looks like a rank that waits for others: in a collective operation, or in a backward pass."""
        main = self.stacks.rpartition("(most recent call first):\n")[2].splitlines()
        return bool(main) and any(where in main[0] for where in _WAITING)


class Watchdog:
    """Of one trainer. Made before it is forked.

    :param after_s: see `Config.hang_after_s`; None watches nothing.
    :param patient: give it as long at every step as before the end of the first: it may be compiling.
    """

    def __init__(self, page: Page, rank: int, after_s: float | None, *, patient: bool) -> None:
        self._page = page
        self._rank = rank
        self._after_s = after_s
        self._patient = patient
        self._stacks = os.memfd_create("dtrain-stacks", os.MFD_CLOEXEC)
        self._looked = self._excused = time.monotonic()

    def in_the_trainer(self) -> None:
        """Have stacks written on demand. C code does it, so a loop that never lets another thread run says it too."""
        faulthandler.register(_DUMP_SIGNAL, file=self._stacks, all_threads=True)

    def is_silent(self) -> bool:
        """Whether the trainer has left no mark for too long. To be asked about every `TICK_S`."""
        now = time.monotonic()
        if now - self._looked > _ASLEEP_S:
            self._excused = now
        self._looked = now
        page = self._page
        if self._after_s is None or page.phase in _UNWATCHED:
            return False
        limit = self._after_s
        if page.step <= page.restored or self._patient or page.phase in _SLOW:
            limit *= _MANY_TIMES
        limit = max(limit, _MANY_TIMES * page.learned_ns / 1e9)
        return now - max(page.marked_ns / 1e9, self._excused) > limit

    def report(self, pid: int) -> Report:
        """:param pid: the trainer's."""
        page = self._page
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            pid=pid,
            step=page.step if page.phase == Phase.END else page.at,
            micro_batch=page.micro_batch,
            left=page.left,
            phase=page.phase,
            silent_s=time.monotonic() - page.marked_ns / 1e9,
            state=_status(pid, "State")[:1],
            stacks=self._dump(pid),
        )

    def _dump(self, pid: int) -> str:
        """The stacks of a trainer, and of the processes that it has started to load data."""
        text = ""
        last = time.monotonic() + _ALL_DUMPS_S
        for process in (pid, *_children(pid)):
            if time.monotonic() > last:
                break
            caught = int(_status(process, "SigCgt") or "0", 16)
            if not caught >> (_DUMP_SIGNAL - 1) & 1:  # it would be killed by it
                continue
            start = os.fstat(self._stacks).st_size
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, _DUMP_SIGNAL)
            size, deadline = -1, time.monotonic() + _DUMP_S
            while time.monotonic() < deadline and (size <= start or size != os.fstat(self._stacks).st_size):
                size = os.fstat(self._stacks).st_size
                time.sleep(0.05)
            found = os.pread(self._stacks, _REPORT_BYTES, start).decode(errors="replace")
            if process != pid and found:
                found = f"\nProcess {process}, started by it:\n{found}\n"
            text = found + text  # the trainer's own at the end
        return text[-_REPORT_BYTES:]

    def close(self) -> None:
        os.close(self._stacks)


def ended(rank: int) -> Report:
    """The report of a rank whose trainer has come to the end of main."""
    return Report(
        rank=rank,
        host=socket.gethostname(),
        pid=0,
        step=0,
        micro_batch=-1,
        left=0,
        phase=Phase.MAIN,
        silent_s=0,
        state="-",
        stacks="",
    )


def blamed(reports: Sequence[Report]) -> list[Report]:
    """Those that all wait for; all of them if there is no telling."""
    for found in (
        [report for report in reports if report.state in "-TtXZ"],
        _least_far(reports),
        [report for report in reports if report.stacks and not report.waits],
    ):
        if 0 < len(found) < len(reports):
            return found
    return list(reports)


def _least_far(reports: Sequence[Report]) -> list[Report]:
    far = {report: (report.step, -report.left, report.phase) for report in reports}
    return [report for report in reports if far[report] == min(far.values())]


def write(reports: Sequence[Report], folder: Path) -> None:
    """A file for each rank: where it is, and its stacks."""
    folder.mkdir(parents=True)
    for report in reports:
        stacks = report.stacks or "It couldn't write its stacks.\n"
        (folder / f"rank-{report.rank}.txt").write_text(f"{report.place}\n\n{stacks}")


def _status(pid: int, field: str) -> str:
    """A line of /proc/<pid>/status; empty if there is none."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return line.partition(":")[2].strip()
    return ""


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found
