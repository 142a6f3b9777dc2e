"""A training job of real processes, seen from outside: started, watched, killed, and gone.

    pytest
      └─ torchrun's agent          job.agent
           └─ supervisor           job.supervisors()[rank]
                ├─ trainer         job.trainers()[rank]
                ├─ watcher         job.watchers()[rank]
                └─ saver           job.savers()[rank]

A job's processes are found by a token in their environment, which is inherited by whatever they start: so none is
overlooked, and nothing is killed that isn't the job's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tests.train_job import Options

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 90.0
"""What takes longer is a hang: many times what the slowest thing here needs on a busy machine of two cores."""
_TOKEN = "DTRAIN_TEST_JOB"
_FORKING = "import dtrain, torch._dynamo\nfrom torch.distributed.run import main\nmain()"
"""Torchrun, with all that its ranks would import."""
T = TypeVar("T")


class Hang(AssertionError):
    """Something that was waited for didn't come."""


class Job:
    """One start of the training. Use `start`.

    :ivar agent: process id of torchrun's agent; without torchrun, of the only supervisor.
    :ivar output: the file that stdout and stderr of all its processes go to.
    """

    def __init__(self, options: Options, ranks: int, restarts: int, output: Path, *, fresh: bool) -> None:
        """:param ranks: 0 runs the script by itself, without torchrun."""
        self.options = options
        self.ranks = max(1, ranks)
        self.output = output
        self._evidence = Path(options.evidence)
        self._before = len(self.lives())
        self._under_torchrun = ranks > 0
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        program = ["-m", "tests.train_job"]
        if ranks and fresh:
            program = ["-m", "torch.distributed.run", *torchrun, *program]
        elif ranks:
            program = ["-c", _FORKING, *torchrun, "--run-path", "--start-method=fork", "tests/train_job.py"]
        token = uuid.uuid4().hex
        self._mark = f"{_TOKEN}={token}".encode()
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", _TOKEN)}
        temporary = self._evidence / "tmp"  # so that what torchrun leaves behind is cleared away with the test
        temporary.mkdir(parents=True, exist_ok=True)
        environment |= {
            _TOKEN: token,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(temporary),
        }
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, *program, options.to_json()],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.agent = self._process.pid

    # --- what it is made of

    def lives(self) -> list[dict[str, Any]]:
        """Every trainer that ever came up in the run, oldest first."""
        return list(read_lines(self._evidence / "lives.jsonl"))

    def born_here(self) -> set[int]:
        """Process ids of the trainers that came up in this start of the run."""
        return {life["pid"] for life in self.lives()[self._before :]}

    def trainers(self) -> dict[int, int]:
        """Process ids by rank, of the trainers that have come up and are alive."""
        alive = {life["rank"]: life["pid"] for life in self.lives()[self._before :]}
        return {rank: pid for rank, pid in alive.items() if _alive(pid)}

    def supervisors(self) -> dict[int, int]:
        """Process ids by rank."""
        alive = {life["rank"]: life["supervisor"] for life in self.lives()[self._before :]}
        return {rank: pid for rank, pid in alive.items() if _alive(pid)}

    def watchers(self) -> dict[int, int]:
        """Process ids by rank."""
        return self._called("dtrain-watcher")

    def savers(self) -> dict[int, int]:
        """Process ids by rank."""
        return self._called("dtrain-saver")

    def _called(self, name: str) -> dict[int, int]:
        """Of each supervisor, the child of this name."""
        found = {}
        for rank, supervisor in self.supervisors().items():
            for pid in children(supervisor):
                with contextlib.suppress(OSError):  # it has just ended
                    if _alive(pid) and Path(f"/proc/{pid}/comm").read_text().strip() == name:
                        found[rank] = pid
        return found

    def processes(self) -> list[int]:
        """All that are alive, the agent included."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_mine(pid)]

    def _is_mine(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and _alive(pid)
        except OSError:  # it has just ended, or is somebody else's
            return False

    # --- where it is

    def step(self) -> int:
        """The furthest step that any trainer of the run has begun."""
        return max((last_step(path) for path in self._evidence.glob("trace-*.jsonl")), default=0)

    def born(self, rank: int, known: int) -> int:
        """Process id of the newest trainer of a rank, after the first `known` of all; 0 if there is none yet."""
        return max((life["pid"] for life in self.lives()[known:] if life["rank"] == rank), default=0)

    def traced(self) -> set[int]:
        """Process ids of the trainers that have begun a step."""
        return {line["pid"] for path in self._evidence.glob("trace-*.jsonl") for line in read_lines(path)}

    def until(self, what: str, condition: Callable[[], T], seconds: float = PATIENCE_S) -> T:
        """Wait until `condition` gives something true, and return that.

        :raises Hang: it didn't within `seconds`, or the job ended before.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self._process.poll() is not None and not (found := condition()):
                raise Hang(f"the job ended with {self._process.returncode} before {what}\n{self.tail()}")
            if found:
                break
            if time.monotonic() > deadline:
                raise Hang(f"no {what} within {seconds:.0f} s, at step {self.step()}\n{self.tail()}")
            time.sleep(0.001)
        return found

    def until_new_steps(self, count: int = 2) -> None:
        """Wait until steps were done that no trainer had done before. The one that was begun last may not be done."""
        goal = self.step() + count
        self.until(f"step {goal}", lambda: self.step() >= goal)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the end of the job: its exit code. All that it started must have ended by then."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Hang(f"not at an end after {seconds:.0f} s, at step {self.step()}\n{self.tail()}") from None
        self.until_gone()
        return code

    def until_gone(self, seconds: float = 5.0) -> None:
        """Wait until none of its processes is left. :raises Hang: one is."""
        deadline = time.monotonic() + seconds
        self._process.wait(seconds)
        while left := self.processes():
            if time.monotonic() > deadline:
                raise Hang(f"{len(left)} processes outlived the job: {[command_of(pid) for pid in left]}")
            time.sleep(0.005)

    def tail(self) -> str:
        """The last of what it printed."""
        return self.output.read_text(errors="replace")[-6000:]

    # --- what is done to it

    def kill(self, *pids: int) -> None:
        """SIGKILL to processes, as far as they are this job's."""
        for pid in filter(self._is_mine, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_all(self) -> None:
        """SIGKILL to every process at once, the agent first: as when a machine loses its power."""
        self.kill(self.agent, *self.processes())
        self.until_gone()


@contextlib.contextmanager
def start(options: Options, ranks: int, *, restarts: int = 0, fresh: bool = False) -> Iterator[Job]:
    """Start a job; at the end of the block, nothing of it is left.

    :param ranks: 0 runs the script by itself, without torchrun.
    :param restarts: how often torchrun may start the group again.
    :param fresh: let torchrun start new interpreters. Else it forks itself, by options of its own, which saves each
        rank the import of torch.
    """
    Path(options.evidence).mkdir(parents=True, exist_ok=True)
    job = Job(options, ranks, restarts, Path(options.evidence) / "output.txt", fresh=fresh)
    try:
        yield job
    finally:
        while left := job.processes():
            job.kill(*left)
        job.until_gone()


def children(pid: int) -> list[int]:
    """The processes that one has started, oldest first."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_of(pid: int) -> str:
    try:
        return f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return f"{pid}: ended since"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, without those that are half written, or cut off by a kill."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def last_step(trace: Path) -> int:
    """The step that a trace has come to."""
    with trace.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
