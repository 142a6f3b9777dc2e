"""`Farewell`: how a supervisor ends: what it says, to people and to torchrun, and its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import NoReturn

from dtrain.ahead import FIRST, STARTED
from dtrain.elastic.generation import Group, Outcome
from dtrain.elastic.placement import Placement
from dtrain.errors import DtrainError
from dtrain.observe.events import say

FAILED = 1
FORM_ANEW = 75
"""EX_TEMPFAIL of sysexits.h."""
_FOR_THE_FIRST_S = 5.0
"""What another process has one of, the first one here will have had soon, and ends the agent."""


class Farewell:
    """One supervisor's.

    :param run: tells the run from others that use the same torchrun.
    :ivar final: nobody is to start the run again.
    :ivar agent_ends: torchrun's agent has said that it ends.
    """

    def __init__(self, placement: Placement, run: str) -> None:
        self._placement = placement
        self._run = run
        self._agent = os.getppid()
        self.final = False
        self.agent_ends = False

    def again(self) -> None:
        """At the start: leave at once if torchrun has started a run again that had ended for good.

        :raises SystemExit: it had.
        """
        outcome = Group.ended_before(self._placement, self._run)
        if outcome is not None:
            self._leave(outcome, "stopped before: ", final=True)

    def remember(self, outcome: Outcome, group: Group) -> None:
        """Before what takes its time: leave word of the end for the processes that torchrun may start again."""
        self.final = outcome.kind == "stopped" or (outcome.kind == "ended" and group.asked_to_end()[1])
        if self.final:
            group.remember_end(self._run, outcome)
        if self.final or outcome.kind == "done":
            group.forget_failures(self._run)

    def leave(self, outcome: Outcome, committed: int) -> NoReturn:
        """After a generation with no other behind it.

        :param committed: the step of the newest checkpoint.
        :raises SystemExit: always.
        """
        if outcome.kind == "ended" and self._placement.rank == 0:
            why = f"{signal.Signals(outcome.signal).name}{f' ({outcome.cause})' if outcome.cause else ''}"
            # The agent ends its processes also to form the group anew.
            by = "" if self.final else " of torchrun's agent, which decides what is next"
            say(f"stopped by {why}{by}: the newest checkpoint is that of step {committed}")
        self._leave(outcome, "stopped: ", final=self.final)

    def _leave(self, outcome: Outcome, before: str, *, final: bool) -> NoReturn:
        place = self._placement
        first = outcome.rank == place.rank
        if outcome.kind == "stopped":
            why = outcome.cause if "rank" in outcome.cause else f"rank {outcome.rank} failed: {outcome.cause}"
            if first:
                say(before + why)
                if outcome.trace and outcome.trace not in why and before == "stopped: ":
                    say(outcome.trace)
            _for_torchrun(f"{why}\n{outcome.trace}" if first else f"stopped because rank {outcome.rank} has failed")
            code = FAILED
        elif outcome.kind == "lost":
            if place.local_rank == 0 and outcome.node == place.node:
                say(f"this node ({outcome.host}) was given up by the others, and asks torchrun to take it in again")
            elif place.local_rank == 0:
                say(f"{outcome.cause}: torchrun is to form the group anew")
            os._exit(FORM_ANEW)  # to take the interpreter down in order takes a second, for which all wait
        else:
            if before != "stopped: " and place.rank == 0:
                say(f"{before}{signal.Signals(outcome.signal).name}")
            code = 128 + (signal.SIGINT if outcome.signal == signal.SIGINT else signal.SIGTERM)
        if final and not self.agent_ends and place.local_rank == 0:
            _end_agent(place, self._agent)
        sys.exit(code)


def end_with(error: BaseException) -> None:
    """Before a process ends with an error that nobody has caught: if the next try would end in the same way, such as
    with an option that can't be right, there is to be none.

    The first process here sees to that. Another one stays until it has, or the agent would start all again before the
    first has come to its own error; and does it itself, should the first have none.
    """
    process, parent = STARTED
    if FIRST and isinstance(error, DtrainError) and process == os.getpid():
        with contextlib.suppress(DtrainError):
            place = Placement.from_env()
            if place.local_rank > 0 and _starts_again(place):
                time.sleep(_FOR_THE_FIRST_S)
            _end_agent(place, parent)


def _starts_again(place: Placement) -> bool:
    return place.store is not None and place.restarts < place.most_restarts


def _end_agent(place: Placement, agent: int) -> None:
    """torchrun would start all processes again, and there is no exit code that tells it not to."""
    if _starts_again(place) and os.getppid() == agent:
        os.kill(agent, signal.SIGTERM)


def _for_torchrun(message: str) -> None:
    """Put a message where torchrun's own summary of the failure takes it from."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
