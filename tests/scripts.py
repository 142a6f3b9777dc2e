"""Starting `small_job.py` as a real program: by python or by torchrun, to its end or to be interrupted."""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.run import main as torchrun_main

from dtrain.elastic.process import Child, fork

ROOT = Path(__file__).resolve().parent.parent
JOB = str(Path(__file__).with_name("small_job.py"))


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> list[str]:
        """What dtrain itself said, line by line."""
        return [line.removeprefix("[dtrain] ") for line in self.err.splitlines() if line.startswith("[dtrain] ")]


class Program:
    """A program that was started, as the leader of a session of its own; what it prints goes to files."""

    def __init__(self, child: Child, folder: Path) -> None:
        self._child = child
        self._folder = folder

    def out(self) -> str:
        return (self._folder / "out").read_text()

    def err(self) -> str:
        return (self._folder / "err").read_text()

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to every process of the foreground group."""
        os.killpg(self._child.pid, signal.SIGINT)

    @property
    def pid(self) -> int:
        """Of torchrun's agent; without torchrun, of the supervisor."""
        return self._child.pid

    def steps(self) -> int:
        """How many steps were done, as the script itself has printed it."""
        return max((int(line.split()[1]) for line in self.out().splitlines() if line.startswith("step ")), default=0)

    def wait_for(self, found: Callable[[], object]) -> None:
        """Wait until something is seen while the program runs."""
        while not found():
            assert not self._has_ended(), f"it ended too early: {self.out()}{self.err()}"
            time.sleep(0.01)

    def end(self, timeout_s: float = 100.0) -> Ended:
        """Wait for its end. :raises AssertionError: it doesn't come."""
        begun = time.monotonic()
        assert select.select([self._child.pidfd], [], [], timeout_s)[0], f"still runs: {self.out()}{self.err()}"
        return Ended(self._child.wait(), self.out(), self.err(), time.monotonic() - begun)

    def _has_ended(self) -> bool:
        return bool(select.select([self._child.pidfd], [], [], 0)[0])


@contextmanager
def started(
    *args: object, ranks: int = 0, torchrun: tuple[str, ...] = (), fresh: bool = False, nohup: bool = False
) -> Iterator[Program]:
    """`small_job.py` with these arguments; it is killed at the end of the block.

    :param ranks: 0 for one process without torchrun, else torchrun with so many.
    :param fresh: new interpreters. Else all are forks of this process, which saves each the import of torch; torchrun
        has options of its own for that.
    :param nohup: it was started so that it goes on after its terminal is closed.
    """
    arguments = [JOB, *map(str, args)]
    options = ["--standalone", f"--nproc-per-node={ranks}", *torchrun]
    command = [sys.executable, *(["-m", "torch.distributed.run", *options] if ranks else []), *arguments]
    with TemporaryDirectory() as name:
        folder = Path(name)
        for stream in ("out", "err"):
            (folder / stream).touch()

        def program() -> int:
            os.setsid()
            for stream, descriptor in (("out", 1), ("err", 2)):
                file = os.open(folder / stream, os.O_WRONLY | os.O_APPEND)
                os.dup2(file, descriptor)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
            os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            if fresh:
                os.execv(sys.executable, command)
            sys.argv = arguments
            try:
                if ranks:
                    torchrun_main([*options, "--run-path", "--start-method=fork", *arguments])
                else:
                    runpy.run_path(JOB, run_name="__main__")
            except SystemExit as error:
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                return error.code if isinstance(error.code, int) else int(error.code is not None)
            return 0

        child = fork(program)
        try:
            yield Program(child, folder)
        finally:
            child.kill()


def run(*args: object, ranks: int = 0, torchrun: tuple[str, ...] = (), fresh: bool = False) -> Ended:
    """`small_job.py` from its start to its end."""
    with started(*args, ranks=ranks, torchrun=torchrun, fresh=fresh) as program:
        return program.end()
