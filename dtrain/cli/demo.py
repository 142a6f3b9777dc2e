"""`dtrain demo`: train twice, kill processes in the second run, and compare what comes out.

Nothing in it is staged: the runs are ordinary ones of dtrain.examples.gpt under torchrun, a kill is a SIGKILL that the
run isn't told of, and the two results are compared by the bytes of their checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.cli.torchrun import Torchrun
from dtrain.cli.weights import last_tensors, sha256
from dtrain.errors import ConfigError
from dtrain.examples import gpt
from dtrain.examples.corpus import Windows, read_corpus
from dtrain.observe.events import say
from dtrain.observe.report import Failure, History, history, losses

MODULE = "dtrain.examples.gpt"
_BUCKET = "bucket"
_SAVES_PER_KILL = 4
"""Checkpoints from one kill to the next."""
_POLL_S = 0.02
_WIDEST = 100
"""Columns. A chart that is wider is no clearer."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A SIGKILL that was sent."""

    time: float
    """Unix time in seconds."""
    rank: int


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small GPT twice, the second time with processes killed, and compare the weights bit for bit.

    Takes about two minutes on two CPU cores. The exit code is 0 if the weights and the optimizer state are equal,
    and 1 otherwise.
    """

    data: tuple[Path, ...] = ()
    """Files and folders to learn from. Without any: the Python standard library's own source."""

    nproc: int = 2
    """Processes that train together. They use GPUs if there are enough of them, otherwise CPU cores."""

    steps: int = 420
    """Steps to train for, in each of the two runs."""

    kills: int = 2
    """How many processes to kill in the second run, one after the other."""

    dir: Path | None = None
    """Where to keep the two run folders. By default they are in a temporary folder and deleted at the end."""

    seed: int = 0
    """Fixes the training, and which process is killed when."""

    s3: bool = False
    """Keep the checkpoints in a bucket instead, of a real S3 server (SeaweedFS) that is started for it here."""

    def run(self) -> int:
        """:raises ConfigError: an option can't be right."""
        self._check()
        with self._folder() as folder, self._server(folder):
            calm, struck = folder / "undisturbed", folder / "killed"
            _print(textwrap.fill(self._title(), _width()))
            _print(f"\n1. Undisturbed: {self.steps} steps, a checkpoint every {self._save_every}.\n")
            took = self._train(calm, kills=[])
            if took is None:
                return 1
            _print(f"   Done in {took:.0f} s.")
            _print(f"\n2. The same again, and {_times(self.kills, 'process', 'processes')} killed without warning.\n")
            kills: list[Kill] = []
            took = self._train(struck, kills=kills)
            if took is None:
                return 1
            _print(f"   Done in {took:.0f} s.\n")
            code = self._conclude(calm, struck, kills)
            if self.dir is not None:
                _print(f"The runs are kept in {folder}.")
            return code

    @property
    def _save_every(self) -> int:
        return self.steps // ((self.kills + 1) * _SAVES_PER_KILL)

    def _check(self) -> None:
        defaults = gpt.Options()
        for name, least in (("nproc", 1), ("kills", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be {least} or more")
        if self._save_every < 2:
            least = 2 * (self.kills + 1) * _SAVES_PER_KILL
            raise ConfigError(
                f"--steps {self.steps}: too few for --kills {self.kills}, each of which is to fall between two "
                f"checkpoints; take {least} steps or more"
            )
        most = defaults.global_batch // defaults.micro_batch
        if self.nproc > most:
            raise ConfigError(f"--nproc {self.nproc}: a step has {most} micro-batches to share; take {most} or fewer")
        windows = len(Windows(read_corpus(self.data), defaults.size.context))
        if windows < defaults.global_batch:
            least = defaults.global_batch * defaults.size.context + 1
            raise ConfigError(f"--data: too little text, {windows} windows; a step needs {least} bytes or more")

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        if self.dir is None:
            with tempfile.TemporaryDirectory(prefix="dtrain-demo-", ignore_cleanup_errors=True) as folder:
                yield Path(folder)
            return
        folder_kept = self.dir.expanduser().absolute()
        for name in ("undisturbed", "killed"):
            if (folder_kept / name).exists():
                raise ConfigError(
                    f"--dir {self.dir}: {folder_kept / name} is there already, from an earlier demo; delete it, or "
                    "name another folder"
                )
        yield folder_kept

    @contextlib.contextmanager
    def _server(self, folder: Path) -> Iterator[None]:
        """What the runs' checkpoints are in, unless that is the folder."""
        if not self.s3:
            yield
            return
        try:
            from dtrain.cli.s3_server import seaweed  # which needs more than the rest
        except ImportError as error:
            raise ConfigError(f"--s3 needs {error.name}: pip install 'dtrain[demo]'") from error
        with seaweed(folder / "server") as server:
            os.environ |= server.environment
            _print(f"S3 server: SeaweedFS on {server.url}\n")
            yield

    def _place(self, run: Path) -> str:
        """Where a run's checkpoints are; its events and metrics are in its folder anyway."""
        return f"s3://{_BUCKET}/{run.name}" if self.s3 else str(run)

    def _title(self) -> str:
        where = f"{self.nproc} GPUs (NCCL)" if self._gpus else "the CPU (gloo)"
        text = ", ".join(map(str, self.data)) if self.data else "the source of Python's standard library"
        workers = _times(self.nproc, "process", "processes")
        return f"dtrain demo: {workers} on {where} train a small GPT twice, on {text}."

    @property
    def _gpus(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.device_count() >= self.nproc

    def _train(self, run: Path, *, kills: list[Kill]) -> float | None:
        """Train in one run folder from start to end, and kill if it is the run `killed`.

        :param kills: what was killed is added here.
        :returns: the seconds that it took; None if torchrun failed.
        """
        arguments = ["--dir", self._place(run), "--steps", str(self.steps), "--seed", str(self.seed)]
        arguments += ["--save-every", str(self._save_every)]
        if self.s3:
            arguments += ["--local-dir", str(run)]
        if self.data:
            arguments += ["--data", *map(str, self.data)]
        # With fewer GPUs than processes, all of them are to find none.
        env = {} if self._gpus else {"CUDA_VISIBLE_DEVICES": ""}
        torchrun = Torchrun(MODULE, arguments, nproc=self.nproc, env=env)
        try:
            if run.name == "killed":
                self._strike(torchrun, run, kills)
            code = torchrun.wait()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes a moment and must not be left half done
            torchrun.end()
            say("interrupted; all processes are ended")
            raise
        finally:
            torchrun.end()
        if code == 0:
            return time.monotonic() - torchrun.started
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        say(f"the demo failed: torchrun ended with {how}; what it said is above")
        return None

    def _strike(self, torchrun: Torchrun, run: Path, kills: list[Kill]) -> None:
        """Kill one trainer after the other, until that is done or torchrun ends."""
        chance = random.Random(self.seed)
        ranks: list[int] = []
        for number in range(1, self.kills + 1):
            after = number * _SAVES_PER_KILL * self._save_every
            ranks = ranks or chance.sample(range(self.nproc), self.nproc)  # all have their turn
            rank, part = ranks.pop(), chance.uniform(0.3, 0.7)
            kill: Kill | None = None
            while kill is None:
                if torchrun.wait(_POLL_S) is not None:
                    return
                seen = history(run)
                trainer = seen.alive(rank)
                if trainer is not None and time.time() >= _moment(seen, after, part):
                    at = torchrun.kill(trainer.pid)
                    kill = None if at is None else Kill(time=at, rank=rank)
            kills.append(kill)
            say(f"demo: kill {number} of {self.kills}: SIGKILL to rank {rank}")

    def _conclude(self, calm: Path, struck: Path, kills: list[Kill]) -> int:
        """Show what happened and whether it left a trace. :returns: the exit code."""
        before, after = losses(calm), losses(struck)
        failures = history(struck).failures
        differ = [step for step in sorted(before.keys() | after.keys()) if before.get(step) != after.get(step)]
        same = f"from step {differ[0]} on the two runs differ" if differ else "both runs have this very curve"
        _print(f"Loss in nats a byte; {same}. A dotted line is a kill.")
        _print(_chart(after, [failure.step for failure in failures], _width()))
        _print("\n" + _table(failures, kills) + "\n")
        (step, one), (other_step, other) = last_tensors(self._place(calm)), last_tensors(self._place(struck))
        digests = sha256(one), sha256(other)
        equal = digests[0] == digests[1] and step == other_step == self.steps
        size = sum(tensor.nbytes for tensor in one.values())
        _print(f"SHA-256 of weights and optimizer state, {len(one)} tensors, {size / 1e6:.1f} MB, after step {step}:")
        _print(f"  undisturbed  {digests[0]}\n  killed       {digests[1]}")
        if equal:
            _print("Equal, bit for bit.")
        else:
            names = [
                name
                for name in sorted(one.keys() | other.keys())
                if name not in one or name not in other or sha256({"": one[name]}) != sha256({"": other[name]})
            ]
            _print(f"NOT EQUAL: {len(names)} tensors differ, such as {', '.join(names[:3]) or 'none'}.")
        if len(kills) < self.kills:
            _print(f"Only {len(kills)} of {self.kills} kills took place before the training was over.")
        return 0 if equal and len(kills) == self.kills else 1


def _moment(seen: History, after: int, part: float) -> float:
    """When to kill: some time after the commit of step `after`, but before the next one; infinity if that is open.

    :param part: how far into the time between two commits.
    """
    times = [commit.time for commit in seen.commits]
    reached = next((index for index, commit in enumerate(seen.commits) if commit.step >= after), 0)
    if reached == 0:
        return float("inf")
    between = statistics.median(later - sooner for sooner, later in itertools.pairwise(times[: reached + 1]))
    return times[reached] + part * between


def _chart(curve: dict[int, float], marks: list[int], width: int) -> str:
    """A curve with vertical lines, in plain characters."""
    try:
        import plotext
    except ImportError:
        return "(pip install 'dtrain[demo]' brings plotext, which draws the curve here)"
    figure = plotext.figure
    figure.clear()
    figure.plot_size(width, 11)
    figure.axes(False, axis="x", side="upper")
    figure.axes(False, axis="y", side="right")
    for mark in marks:
        figure.line(mark, orientation="vertical", style="dotted")
    figure.draw(figure.signal(list(curve), list(curve.values()), marker="hd").lines(True))
    last = max(curve)
    ticks = [1, *marks, last]
    ticks += [at for at in range(0, last, max(1, last // 6)) if all(abs(at - tick) > last / 12 for tick in ticks)]
    figure.ruler("x").ticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    whole = list(range(int(min(curve.values())) + 1, int(max(curve.values())) + 1))
    if len(whole) > 1:
        figure.ruler("y").ticks(whole, [str(value) for value in whole])
    drawn: str = figure.build().string(colorless=True)
    return "\n".join(line.rstrip() for line in drawn.rstrip().splitlines())


def _table(failures: list[Failure], kills: list[Kill]) -> str:
    """What each failure cost; times count from the kill."""
    rows = [("failed", "at step", "noticed", "state restored", "steps lost", "first new step done")]
    for failure in failures:
        sent = [kill.time for kill in kills if kill.rank == failure.rank and kill.time <= failure.time]
        start = sent[-1] if sent and failure.cause == "killed by SIGKILL" else failure.time
        rows.append(
            (
                f"rank {failure.rank}",
                str(failure.step),
                f"after {1000 * (failure.time - start):.0f} ms" if start != failure.time else failure.cause,
                _after(failure.restored_at, start),
                "-" if failure.lost_steps is None else str(failure.lost_steps),
                _after(failure.caught_up_at, start),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _after(at: float | None, start: float) -> str:
    return "-" if at is None else f"after {at - start:.2f} s"


def _times(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _width() -> int:
    return min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)


def _print(text: str) -> None:
    print(text, flush=True)
    sys.stderr.flush()
