"""The supervisor: keeps one trainer alive.

    supervisor ─┬─ trainer   the user's main
                └─ watcher   blocks on the store until some rank's supervisor has settled the generation

It starts no thread, uses no GPU and takes part in no collective, so it can fork at any time. When its trainer dies it
settles the generation for all ranks; when another rank's did, the watcher ends. Either way it kills its own trainer
and forks the next. A supervisor or an agent that dies is torchrun's to replace.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist

from dtrain.config import Config
from dtrain.elastic.generation import Group, Outcome, Placement
from dtrain.elastic.process import Child, Page, check_can_fork, die_with, fork
from dtrain.errors import DtrainError
from dtrain.observe.events import Events, say

_VICTIM_WAIT_S = 0.25
"""A failed collective is most often another rank's death: that rank gets so long to say so itself."""
_TRACE_BYTES = 30_000
"""Less than the capacity of a pipe, so that a trainer is never held up while it says why it failed."""

Work = Callable[[Group, int, Page], None]
"""What a trainer does, given its group, the generation's number, and the page it shares with its supervisor."""


class Supervisor:
    """See above.

    :param work: run in each trainer.
    """

    def __init__(self, config: Config, placement: Placement, work: Work) -> None:
        self._config = config
        self._placement = placement
        self._work = work
        self._events = Events(config.dir)
        self._page = Page.shared()
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
        group = Group(self._placement, self._config.timeout_s)
        generation = 0
        while True:
            outcome = self._live_through(group, generation)
            if outcome.kind == "done":
                break
            if outcome.kind == "stopped":
                group.remember_stop(run, outcome)
                self._give_up(outcome)
            self._best, self._stalled = outcome.best, outcome.stalled
            generation += 1
        if self._page.stop:
            sys.exit(128 + signal.SIGINT)

    def _live_through(self, group: Group, generation: int) -> Outcome:
        """Fork a trainer, and have it behind us when the generation is settled."""
        self._page.best, self._page.step, self._page.restored = self._best, 0, 0
        said, saying = os.pipe()
        trainer = fork(lambda: self._train(group, generation, saying))
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

    def _train(self, group: Group, generation: int, saying: int) -> int:
        """The trainer's whole life. Why it failed goes through the pipe, while its peers still see it alive."""
        try:
            self._work(group, generation, self._page)
        except SystemExit as error:
            if error.code in (None, 0):
                return 0
            failure: dict[str, Any] = {"cause": f"exited with {error.code!r}", "trace": traceback.format_exc()}
        except BaseException as error:
            failure = {
                "cause": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "trace": str(error) if isinstance(error, DtrainError) else traceback.format_exc(),
                "final": isinstance(error, DtrainError),
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
                self._watcher = fork(lambda: group.watch(generation))
                poll.register(self._watcher.pidfd, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(patience)}
            if self._watcher is not None and self._watcher.pidfd in ready:
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

    def _fail(self, group: Group, generation: int, failure: dict[str, Any]) -> Outcome:
        """Settle a generation whose trainer failed here, unless another rank was first."""
        page = self._page
        known = max(self._best, page.restored)
        stalled = 0 if page.step > known else self._stalled + 1
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
            if os.path.isdir(self._config.dir):
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
            why = f"no new step in {outcome.stalled} generations; the last time {why}"
        if first:
            say(f"stopped{' before' if again else ''}: {why}")
            if outcome.trace and outcome.trace not in why and not again:
                say(outcome.trace)
        _tell_torchrun(f"{why}\n{outcome.trace}" if first else f"stopped because {why}")
        sys.exit(1)

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
