"""The supervisor: keeps one trainer alive.

    supervisor ─┬─ trainer   the user's main
                ├─ watcher   blocks on the store until some rank's supervisor has settled the generation
                ├─ heart     one on each of several nodes: beats, and watches the next node's beat
                ├─ keeper    keeps the snapshots in memory for the next supervisor, when torchrun starts all anew
                └─ saver     writes snapshots to storage; lives as long as the supervisor

It starts no thread, uses no GPU and takes part in no collective, so it can fork at any time. When its trainer dies, or
doesn't come any further, it settles the generation for all ranks; when another rank's did, the watcher ends. Either way
it kills its own trainer and forks the next. A supervisor, an agent or a node that dies is torchrun's to replace.

It ends with one of these codes, and torchrun itself with 1 for all but the first:

    0     the training is done
    1     it has failed for good: the error would come again, or came too often
    75    a node is gone: torchrun is to form the group anew
    130   Ctrl-C, after a checkpoint; the second one ends it at once
    143   SIGTERM, SIGUSR1 or a notice, after a checkpoint
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from dtrain.ahead import STARTED
from dtrain.checkpoint.channel import Client
from dtrain.checkpoint.slots import Slots
from dtrain.config import Config
from dtrain.elastic import watchdog
from dtrain.elastic.failure import Failure
from dtrain.elastic.farewell import Farewell
from dtrain.elastic.generation import Group, Outcome, run_name
from dtrain.elastic.helpers import Heart, SaverProcess, Watcher
from dtrain.elastic.keeper import Keeper
from dtrain.elastic.page import STOPPED, Page
from dtrain.elastic.placement import Placement
from dtrain.elastic.process import ENDING, Child, check_can_fork, die_with, fork, held_through_fork
from dtrain.elastic.signals import Signals
from dtrain.elastic.verdict import Judge
from dtrain.elastic.watchdog import TICK_S, Report, Watchdog
from dtrain.observe.events import Events, say

_VICTIM_WAIT_S = 0.25
"""A failed collective is most often another rank's death: that rank gets so long to say so itself."""
_FOR_THE_STEP = 0.7
_FOR_THE_SAVER = 0.25
"""The parts of the grace time that a step has to be finished and saved in, and after that the newest snapshot."""
_SUSPICION_S = 2.5
"""Whether all are silent is looked at again after so long: a rank may have come to its end since it said so."""
_MOST_NAMED = 4
"""Ranks in a message."""


@dataclass(frozen=True)
class Life:
    """What a trainer is given."""

    group: Group
    generation: int
    page: Page
    slots: Slots
    client: Client
    """Its saver."""
    skipped: tuple[int, ...] = ()
    """Steps to pass over."""


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
        # What `nohup` has had ignored stays so.
        self._ending = [s for s in ENDING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._asked: signal.Signals | None = None
        """To end, by this signal."""
        self._deadline = math.inf
        self._started = time.time()
        self._said = ""
        """The last traceback that was shown: the same one isn't shown again."""

    def run(self) -> None:
        """Return when the training is done.

        :raises SystemExit: it isn't; see above for the codes.
        """
        check_can_fork()
        gc.freeze()  # what is there, the forks keep: not to look at it leaves its memory shared
        if self._placement.store is not None:
            process, parent = STARTED
            die_with(parent if process == os.getpid() else os.getppid())
        self._run = run_name(self._config)
        self._farewell = Farewell(self._placement, self._run)
        self._farewell.again()
        self._group = Group(self._placement, self._config.timeout_s)
        if self._placement.rank == 0:  # all have passed by the word of an earlier end
            self._group.forget_end(self._run)
        replicate = self._config.replicate_snapshots > 0
        keeper = Keeper(self._placement, self._run, replicate=replicate, say=self._events.warn)
        self._slots = keeper.slots
        self._judge = Judge(self._config, self._page, self._slots.board)
        self._signals = Signals((signal.SIGINT, *self._ending))
        self._saver = SaverProcess(self._config, self._group, self._slots, self._events, self._fork)
        self._heart = Heart(self._fork, self._group, self._page)
        generation = 0
        while True:
            outcome = self._live_through(generation)
            if outcome.kind != "failed":
                break
            self._judge.learn(outcome)
            generation += 1
        self._farewell.remember(outcome, self._group)
        if outcome.kind in ("stopped", "ended") and not outcome.saved:
            self._saver.save_last()
        if outcome.kind == "lost":
            self._saver.kill()  # it may be waiting for the part of a saver that is gone
            place = self._placement
            if place.local_rank == 0 and (place.node + 1) % place.nodes == outcome.node:  # once
                self._events.emit("lost", cause=outcome.cause, host=outcome.host)
        else:
            self._end_saver()
        self._heart.kill()
        if self._farewell.final or outcome.kind == "done":
            keeper.end()
        if outcome.kind != "done":
            self._farewell.leave(outcome, max(self._slots.board.committed, self._page.committed))
        self._signals.close()

    def _live_through(self, generation: int) -> Outcome:
        """Fork a trainer, and have it behind us when the generation is settled."""
        self._judge.begin(generation)
        if self._group.asked_to_end()[0]:  # while the generation before failed
            self._page.stop = 1
        said, saying = os.pipe()
        client = self._saver.client(generation)
        life = Life(self._group, generation, self._page, self._slots, client, self._judge.skipped)
        config = self._config
        dog = Watchdog(self._page, self._placement.rank, config.hang_after_s, patient=config.compile)
        trainer = self._fork(lambda: self._train(life, dog, saying), "dtrain-trainer")
        os.close(saying)
        watcher = Watcher(self._fork, self._group, generation)
        try:
            return self._wait(generation, trainer, watcher, dog, said)
        finally:
            os.close(said)
            trainer.kill()
            watcher.end()
            dog.close()
            self._saver.over(generation)

    def _fork(self, work: Callable[[], int], name: str) -> Child:
        # torchrun's agent sends its signals to the whole process group, and it's the supervisor that knows what to do.
        return fork(work, name, apart=self._placement.store is not None)

    def _train(self, life: Life, dog: Watchdog, saying: int) -> int:
        """The trainer's whole life."""
        supervisor = os.getppid()

        def pass_on(number: int, frame: FrameType | None) -> None:
            os.kill(supervisor, number)

        def mean_it() -> None:  # a process that the user's code has forked: the signal is for it, and not for the run
            for number in self._ending:
                if signal.getsignal(number) is pass_on:
                    signal.signal(number, signal.SIG_DFL)

        for number in self._ending:
            signal.signal(number, pass_on)
        held_through_fork(mean_it)
        dog.in_the_trainer()
        try:
            self._work(life)
        except BaseException as error:
            if isinstance(error, SystemExit) and error.code in (None, 0):
                return 0
            Failure.of(error).tell(saying)
            return 1
        return 0

    def _wait(self, generation: int, trainer: Child, watcher: Watcher, dog: Watchdog, said: int) -> Outcome:
        """Block until the generation is settled, by us or by another rank's supervisor."""
        group, failure, silent = self._group, None, False
        patience = suspicion = math.inf
        ready: set[int] = set()
        poll = select.poll()
        for descriptor in (trainer.pidfd, said, self._signals.descriptor):
            poll.register(descriptor, select.POLLIN)
        while True:
            others = [self._saver.pidfd, *watcher.descriptors(), *self._heart.descriptors()]
            for descriptor in others:
                poll.register(descriptor, select.POLLIN)
            now = time.monotonic()
            timeout_s = max(0.0, min(TICK_S, patience - now, self._deadline - now))
            ready = {descriptor for descriptor, _ in poll.poll(1000 * timeout_s)}
            for descriptor in others:
                poll.unregister(descriptor)
            if self._signals.descriptor in ready:
                self._on_signal(trainer)
            self._heart.look(ready)
            if self._saver.pidfd in ready:
                self._saver.replace()
            elif watcher.has_ended(ready):
                return group.outcome(generation)
            elif said in ready:
                poll.unregister(said)
                failure = Failure.heard(said)
                if failure is not None and failure.victim and self._placement.world_size > 1:
                    patience = time.monotonic() + _VICTIM_WAIT_S
                elif failure is not None:
                    return self._fail(generation, failure)
            elif trainer.pidfd in ready and failure is None:
                poll.unregister(trainer.pidfd)
                code = trainer.wait()
                if code != 0:
                    return self._fail(generation, Failure.of_code(code))
                if silent:
                    group.silent(generation, None)
                if group.finished(generation):
                    return group.settle(generation, self._at_the_end())
                if group.silent(generation, asdict(watchdog.ended(self._placement.rank))):
                    suspicion = time.monotonic() + _SUSPICION_S
            elif failure is not None and (trainer.pidfd in ready or time.monotonic() >= patience):
                return self._fail(generation, self._unless_one_has_left(generation, failure))
            elif time.monotonic() >= self._deadline:
                cause = f"the step did not come to its end within {_FOR_THE_STEP:.0%} of grace_s={self._config.grace_s}"
                return self._fail(generation, Failure(cause=cause))
            elif trainer.running and dog.is_silent() != silent:
                report = None if silent else dog.report(trainer.pid)
                if silent or dog.is_silent():  # it takes a moment to find out where a trainer is
                    silent = not silent
                    if group.silent(generation, None if report is None else asdict(report)):
                        suspicion = time.monotonic() + _SUSPICION_S
            elif time.monotonic() >= suspicion:
                suspicion = math.inf
                if group.all_silent(generation):
                    return self._hang(generation)
            self._look_for_notice(trainer)

    def _at_the_end(self) -> Outcome:
        """All trainers have come to the end of main, or were told to go there."""
        if self._page.stop != STOPPED:
            return Outcome(kind="done")
        return Outcome(kind="ended", signal=self._group.asked_to_end()[0], saved=True)

    def _unless_one_has_left(self, generation: int, failure: Failure) -> Failure:
        """What makes a victim of a rank may be that another one's training was over too soon."""
        left = self._group.ended(generation)
        if not left:
            return failure
        who = f"rank {left[0]}" if len(left) == 1 else f"ranks {', '.join(map(str, left))}"
        cause = f"{who} came to the end of main while others were in a step; all ranks must go through the same steps"
        return Failure(cause=cause, trace=failure.trace)

    def _hang(self, generation: int) -> Outcome:
        """Settle a generation in which no rank comes any further."""
        reports = [Report(**report) for report in self._group.reports(generation)]
        blamed = watchdog.blamed(reports)
        cause = "hang: " + "; ".join(report.place for report in blamed[:_MOST_NAMED])
        if len(blamed) < len(reports):
            cause += ", and the others wait"
        folder = Path(self._config.local_dir) / "hangs" / time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        try:
            watchdog.write(reports, folder)
            cause += f" (stacks of all ranks: {folder})"
        except OSError as error:
            cause += f" (their stacks can't be written: {error})"
        stacks = next((report.stacks for report in blamed if report.stacks), "")
        return self._fail(generation, Failure(cause=cause, trace=stacks), blamed[0])

    def _fail(self, generation: int, failure: Failure, place: Report | None = None) -> Outcome:
        """Settle a generation that failed, unless another rank was first. :param place: of the rank that did."""
        asked, _ = self._group.asked_to_end()
        rank = self._placement.rank if place is None else place.rank
        mine = self._judge.outcome(failure, rank, len(self._group.failures(self._run)), asked, place)
        outcome = self._group.settle(generation, mine)
        if outcome == mine:
            if not failure.over:
                self._group.remember_failure(self._run)
            page = self._page
            at = max(page.step, page.restored)
            if os.path.isdir(self._config.local_dir) and not failure.agreed:  # whoever goes back says why
                self._events.emit(
                    "failed", generation=generation, rank=mine.rank, cause=mine.cause, step=at, best=mine.best
                )
            if mine.kind == "failed":
                what = "" if failure.agreed else f"rank {mine.rank} failed after step {at}: "
                say(f"{what}{mine.cause}; starting {'all ranks' if failure.agreed else 'it'} again")
                # A victim's says where it was when another one died, which comes out in a moment.
                if mine.trace and mine.trace != self._said and not failure.victim:
                    say(mine.trace)
                self._said = mine.trace
        return outcome

    def _on_signal(self, trainer: Child) -> None:
        found = self._signals.read()
        if found is None:
            return
        number, sender = found
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            trainer.kill()
            os._exit(128 + signal.SIGINT)
        agents = self._placement.store is not None and sender == os.getppid()
        self._farewell.agent_ends |= agents
        self._ask_to_end(number, final=not agents)
        if agents:  # it doesn't wait for long, for whatever signal
            self._deadline = min(self._deadline, time.monotonic() + _FOR_THE_STEP * self._config.grace_s)

    def _look_for_notice(self, trainer: Child) -> None:
        path = self._config.notice_file
        if path and self._asked is None:
            with contextlib.suppress(OSError):
                if os.stat(path).st_mtime >= self._started:
                    self._ask_to_end(signal.SIGTERM, final=True, why=f"{path} is there")

    def _ask_to_end(self, number: signal.Signals, *, final: bool, why: str = "") -> None:
        """Have all ranks stop after the step that they are in."""
        self._page.stop = self._page.stop or 1
        first = self._group.ask_to_end(number, final=final)
        if self._asked is None or number == signal.SIGINT:
            self._asked = number
        if number == signal.SIGINT:
            if self._placement.rank == 0:
                say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
            return
        self._deadline = min(self._deadline, time.monotonic() + _FOR_THE_STEP * self._config.grace_s)
        if first:
            why = why or (number.name if final else f"{number.name} of torchrun's agent, which decides what is next")
            say(f"{why}: stopping after this step, with a checkpoint, within {self._config.grace_s:g} s")

    def _end_saver(self) -> None:
        """Let the saver finish what it is at, and end."""
        self._saver.end()
        # A save may wait for the part of a saver that is gone, and whoever has sent a signal doesn't wait for long.
        until = min(time.monotonic() + self._config.timeout_s, self._deadline + _FOR_THE_SAVER * self._config.grace_s)
        while not self._signals.wait(self._saver.pidfd, max(0.0, until - time.monotonic())):
            found = self._signals.read()
            if found is None or (found[0] == signal.SIGINT and self._asked == signal.SIGINT):
                break
            self._farewell.agent_ends |= found[1] == os.getppid()
            until = min(until, time.monotonic() + _FOR_THE_SAVER * self._config.grace_s)
        self._saver.kill()
