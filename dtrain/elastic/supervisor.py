"""The supervisor: keeps one trainer alive.

    supervisor ─┬─ trainer   the user's main
                ├─ watcher   blocks on the store until some rank's supervisor has settled the generation
                └─ saver     writes snapshots to storage; lives as long as the supervisor

It starts no thread, uses no GPU and takes part in no collective, so it can fork at any time. When its trainer dies it
settles the generation for all ranks; when another rank's did, the watcher ends. Either way it kills its own trainer
and forks the next. A supervisor or an agent that dies is torchrun's to replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

from dtrain.checkpoint.channel import Client, Remote, send, serve
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.snapshot import Slots
from dtrain.config import Config
from dtrain.elastic.generation import Group, Outcome, Placement
from dtrain.elastic.process import Child, Page, check_can_fork, die_with, fork
from dtrain.errors import DtrainError, SaveError
from dtrain.observe.events import Events, say

_VICTIM_WAIT_S = 0.25
"""A failed collective is most often another rank's death: that rank gets so long to say so itself."""
_LAST_SAVE_WAIT_S = 2.0
"""When a run ends for good, the newest snapshot is saved, if all ranks' savers come to it within so long. Not all do
where torchrun ends the processes because one of them has died, and it waits for the others to be gone."""
_SAVERS_NICENESS = 15
"""The training goes first."""
_MOST_DEATHS = 5
"""Of savers, within a minute."""
_TRACE_BYTES = 30_000
"""Less than the capacity of a pipe, so that a trainer is never held up while it says why it failed."""


@dataclass(frozen=True)
class Life:
    """What a trainer is given."""

    group: Group
    generation: int
    page: Page
    slots: Slots
    client: Client
    """Its saver."""


Work = Callable[[Life], None]


class Supervisor:
    """See above.

    :param work: run in each trainer.
    """

    def __init__(self, config: Config, placement: Placement, work: Work) -> None:
        self._config = config
        self._placement = placement
        self._work = work
        self._events = Events(config.local_dir)
        self._page = Page.shared()
        self._slots = Slots()
        self._trainers_end, self._savers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._saver: Child | None = None
        self._savers_deaths: list[float] = []
        self._committed = 0
        """The last commit before this generation."""
        self._generation = 0
        self._best = 0
        self._stalled = 0
        self._trainer: Child | None = None
        self._watcher: Child | None = None
        self._said = ""
        """The last traceback that was shown: the same one isn't shown again."""

    def run(self) -> None:
        """Return when the training is done.

        :raises SystemExit: it has failed for good (1), or was ended by Ctrl-C (130).
        """
        check_can_fork()
        if self._placement.store is not None:
            die_with(os.getppid())
        run = hashlib.sha256(self._config.dir.encode()).hexdigest()[:16]
        stopped = Group.stopped_before(self._placement, run)
        if stopped is not None:
            self._give_up(stopped, again=True)
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, self._on_terminate)
        group = Group(self._placement, self._config.timeout_s)
        generation = 0
        self._saver = self._fork_saver(group)
        while True:
            outcome = self._live_through(group, generation)
            if outcome.kind == "done":
                self._end_saver()
                break
            if outcome.kind == "stopped":
                send(self._trainers_end, do="last", timeout_s=_LAST_SAVE_WAIT_S)
                self._end_saver()
                group.remember_stop(run, outcome)
                self._give_up(outcome)
            self._best, self._stalled = outcome.best, outcome.stalled
            generation += 1
        if self._page.stop:
            sys.exit(128 + signal.SIGINT)

    def _live_through(self, group: Group, generation: int) -> Outcome:
        """Fork a trainer, and have it behind us when the generation is settled."""
        self._page.best, self._page.step, self._page.restored = self._best, 0, 0
        self._committed = self._slots.board.committed
        self._generation = generation
        said, saying = os.pipe()
        client = Remote(self._trainers_end, self._slots.board, generation)
        life = Life(group, generation, self._page, self._slots, client)
        trainer = fork(lambda: self._train(life, saying), "dtrain-trainer")
        self._trainer = trainer
        os.close(saying)
        try:
            return self._wait(group, generation, trainer, said)
        finally:
            os.close(said)
            trainer.kill()
            self._trainer = None
            if self._watcher is not None:
                self._watcher.kill()
                self._watcher = None
            # Whatever this trainer has asked for lies before this in the saver's queue, and nothing of it behind.
            send(self._trainers_end, do="over", generation=generation, rank=self._placement.rank)

    def _train(self, life: Life, saying: int) -> int:
        """The trainer's whole life. Why it failed goes through the pipe, while its peers still see it alive."""
        try:
            self._work(life)
        except SystemExit as error:
            if error.code in (None, 0):
                return 0
            failure: dict[str, Any] = {"cause": f"exited with {error.code!r}", "trace": traceback.format_exc()}
        except BaseException as error:
            failure = {
                "cause": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "trace": str(error) if isinstance(error, DtrainError | SaveError) else traceback.format_exc(),
                "final": isinstance(error, DtrainError),
                "unsaved": isinstance(error, SaveError),
                "victim": _is_victim(error),
            }
        else:
            return 0
        failure["trace"] = failure["trace"][-_TRACE_BYTES:]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(saying, json.dumps(failure).encode() + b"\n")
        os.close(saying)
        time.sleep(_VICTIM_WAIT_S + 5)  # killed long before; its connections must not break first
        return 1

    def _wait(self, group: Group, generation: int, trainer: Child, said: int) -> Outcome:
        """Block until the generation is settled, by us or by another rank's supervisor."""
        poll = select.poll()
        for descriptor in (trainer.pidfd, said):
            poll.register(descriptor, select.POLLIN)
        failure: dict[str, Any] = {}
        patience: float | None = None
        while True:
            if self._watcher is None and self._placement.world_size > 1:
                self._watcher = fork(lambda: group.watch(generation), "dtrain-watcher")
                poll.register(self._watcher.pidfd, select.POLLIN)
            assert self._saver is not None
            poll.register(self._saver.pidfd, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(patience)}
            poll.unregister(self._saver.pidfd)
            if self._saver.pidfd in ready:
                self._replace_saver(group)
            elif self._watcher is not None and self._watcher.pidfd in ready:
                poll.unregister(self._watcher.pidfd)
                code = self._watcher.wait()
                if code == 0:
                    return group.outcome(generation)
                if code > 0:
                    raise ConnectionError("torchrun's store is gone")
                self._watcher = None  # somebody killed it: another one will be told the same
            elif said in ready:
                poll.unregister(said)
                failure = _read(said)
                if failure.get("victim") and self._placement.world_size > 1:
                    patience = 1000 * _VICTIM_WAIT_S
                elif failure:
                    return self._fail(group, generation, failure)
            elif trainer.pidfd in ready and not failure:
                poll.unregister(trainer.pidfd)
                code = trainer.wait()
                if code != 0:
                    return self._fail(group, generation, {"cause": _describe(code)})
                if group.finished(generation):
                    return group.settle(generation, Outcome(kind="done"))
            elif failure:  # nobody else has owned up, or the trainer has ended meanwhile
                return self._fail(group, generation, failure)

    def _fork_saver(self, group: Group) -> Child:
        place = self._placement

        def work() -> int:
            # torchrun sends it to all that a supervisor has forked; the supervisor says when there is nothing to save.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.nice(_SAVERS_NICENESS)
            saver = Saver.of(self._config, group.savers_store, place.rank, place.world_size, self._slots)
            serve(self._savers_end, saver, self._slots.board)
            return 0

        return fork(work, "dtrain-saver")

    def _replace_saver(self, group: Group) -> None:
        """Put another one in the place of a saver that has died.

        :raises RuntimeError: they die one after the other.
        """
        assert self._saver is not None
        cause = _describe(self._saver.wait())
        self._savers_deaths = [*self._savers_deaths[-_MOST_DEATHS:], time.monotonic()]
        if len(self._savers_deaths) > _MOST_DEATHS and self._savers_deaths[-1] - self._savers_deaths[0] < 60:
            raise RuntimeError(f"the saver of rank {self._placement.rank} dies again and again ({cause})")
        self._events.warn(f"the saver of rank {self._placement.rank} was {cause}; it is replaced")
        self._saver = self._fork_saver(group)

    def _end_saver(self) -> None:
        """Let the saver finish what it is at, and end."""
        assert self._saver is not None
        send(self._trainers_end, do="end")
        select.select([self._saver.pidfd], [], [], self._config.timeout_s)
        self._saver.kill()

    def _fail(self, group: Group, generation: int, failure: dict[str, Any]) -> Outcome:
        """Settle a generation whose trainer failed here, unless another rank was first."""
        page = self._page
        known = max(self._best, page.restored)
        # A checkpoint that can't be written doesn't keep the training from new steps, but is no less of a failure.
        committed = self._slots.board.committed
        progress = committed > self._committed if failure.get("unsaved") else page.step > known
        stalled = 0 if progress else self._stalled + 1
        final = failure.get("final") or stalled >= self._config.max_stalled
        mine = Outcome(
            kind="stopped" if final else "failed",
            rank=self._placement.rank,
            cause=failure["cause"],
            trace=failure.get("trace", ""),
            best=max(known, page.step),
            stalled=stalled,
        )
        outcome = group.settle(generation, mine)
        if outcome == mine:
            at = max(page.step, page.restored)
            if os.path.isdir(self._config.local_dir):
                self._events.emit(
                    "failed", generation=generation, rank=mine.rank, cause=mine.cause, step=at, best=mine.best
                )
            if not final:
                say(f"rank {mine.rank} failed after step {at}: {mine.cause}; starting it again")
                if mine.trace and mine.trace != self._said:
                    say(mine.trace)
                self._said = mine.trace
        return outcome

    def _give_up(self, outcome: Outcome, again: bool = False) -> None:
        """End this process with the first failure, the same one on every rank.

        :param again: it has been said before, and torchrun has started the processes again in vain.
        """
        first = outcome.rank == self._placement.rank
        why = f"rank {outcome.rank} failed: {outcome.cause}"
        if outcome.stalled >= self._config.max_stalled:
            what = "checkpoint" if outcome.cause.startswith(SaveError.__name__) else "step"
            why = f"no new {what} in {outcome.stalled} generations; the last time {why}"
        if first:
            say(f"stopped{' before' if again else ''}: {why}")
            if outcome.trace and outcome.trace not in why and not again:
                say(outcome.trace)
        _tell_torchrun(f"{why}\n{outcome.trace}" if first else f"stopped because {why}")
        sys.exit(1)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        """The machine is wanted back, or torchrun ends all processes since one has died: in time for a last save."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in (self._trainer, self._watcher):
            if child is not None:
                with contextlib.suppress(OSError):  # its end was being waited for at this moment
                    child.kill()
        if self._saver is not None:
            if self._placement.rank == 0:
                say("SIGTERM: saving the newest snapshot")
            with contextlib.suppress(OSError, ValueError):  # the saver was being replaced at this moment
                send(self._trainers_end, do="over", generation=self._generation, rank=self._placement.rank)
                send(self._trainers_end, do="last", timeout_s=_LAST_SAVE_WAIT_S)
                self._end_saver()
            if self._placement.rank == 0:
                say(f"stopped: the newest checkpoint is that of step {self._slots.board.committed}")
        os._exit(128 + signal.SIGTERM)

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._page.stop:
            if self._trainer is not None:
                self._trainer.kill()
            os._exit(128 + signal.SIGINT)
        self._page.stop = 1
        if self._placement.rank == 0:
            say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")


def _is_victim(error: BaseException) -> bool:
    """Whether an error looks like the outcome of another rank's death."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/transport", "Connection closed by peer", "Connection reset", "NCCL")
    )


def _describe(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"killed by {signal.Signals(-code).name}"


def _read(descriptor: int) -> dict[str, Any]:
    """The line that a trainer said; {} if it ended without a word."""
    # Not up to the end of the pipe: a data loader's worker may hold that open.
    data = b""
    while not data.endswith(b"\n") and (part := os.read(descriptor, 1 << 16)):
        data += part
    failure: dict[str, Any] = json.loads(data) if data.endswith(b"\n") else {}
    return failure


def _tell_torchrun(message: str) -> None:
    """Put a message where torchrun's own summary of the failure takes it from."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
