"""Between a trainer and its saver: what is asked for, and what is told.

A message is a packet of JSON on a pair of sockets, which the supervisor holds for as long as it lives: either side may
die and be replaced. Where there is no supervisor, the trainer's own process is the saver: `Direct`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Protocol

from dtrain import errors
from dtrain.checkpoint.agreement import Outcome
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Board, Snapshot
from dtrain.errors import SaveError, UsageError

_MOST_BYTES = 1 << 17
"""Of a message. Only a reason why something failed can be long."""


class Client(Protocol):
    """A trainer's view of its saver."""

    def claim(self) -> int:
        """On rank 0: take the run over. :returns: the epoch. :raises Fenced:"""

    def condemn(self, attempt: str, step: int, reason: str, place: int = 0) -> None:
        """On rank 0: mark a checkpoint as bad. :param place: see `Saver`."""

    def acquit(self, attempt: str, step: int, place: int = 0) -> None:
        """On rank 0: take back that a checkpoint is bad."""

    def begin(self, snapshot: Snapshot, metrics: dict[str, float], place: int = 0) -> None:
        """Have a snapshot saved, after the save before it if that is still under way. :param place: see `Saver`."""

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""

    def wait(self) -> None:
        """Wait until no save is under way. :raises SaveError: the last one that this trainer began has failed."""


class Remote:
    """A saver in a process of its own. See `Client`.

    :param end: the trainer's end of the pair of sockets.
    """

    def __init__(self, end: socket.socket, board: Board, generation: int) -> None:
        self._end = end
        self._board = board
        self._generation = generation
        self._begun = 0
        self._outcome: Outcome | None = None

    def claim(self) -> int:
        return int(self._ask("claim"))

    def condemn(self, attempt: str, step: int, reason: str, place: int = 0) -> None:
        self._ask("condemn", attempt=attempt, step=step, reason=reason, place=place)

    def acquit(self, attempt: str, step: int, place: int = 0) -> None:
        self._ask("acquit", attempt=attempt, step=step, place=place)

    def begin(self, snapshot: Snapshot, metrics: dict[str, float], place: int = 0) -> None:
        self.wait()
        message = packed(do="save", snapshot=asdict(snapshot), number=self._begun + 1, metrics=metrics, place=place)
        if len(message) > _MOST_BYTES:
            raise UsageError(
                f"save: {len(metrics)} metrics take {len(message)} bytes, and there is room for {_MOST_BYTES}; "
                "save the few that it is chosen by"
            )
        self._begun += 1
        self._outcome = None
        self._board.saving_generation, self._board.saving = self._generation, self._begun
        self._board.held, self._board.place = snapshot.slot + 1, place
        self._end.send(message)

    @property
    def busy(self) -> bool:
        return self._board.saving != 0

    def wait(self) -> None:
        # The saver clears the board just after it has told the outcome; if it dies in between, the next one does both.
        patience_s = 1.0
        while self._board.saving or (self._begun and self._outcome is None):
            patience_s = 0.001 if self._receive(patience_s) else 1.0
        outcome, self._outcome = self._outcome, Outcome()
        if outcome is not None and outcome.error:
            raise error_of(outcome)

    def _ask(self, do: str, **fields: Any) -> Any:
        token = uuid.uuid4().hex
        send(self._end, do=do, token=token, **fields)
        while (reply := self._receive()).get("token") != token:
            if "born" in reply:  # the one that was asked has died, perhaps without an answer
                send(self._end, do=do, token=token, **fields)
        if reply["error"]:
            raise error_of(Outcome(reply["error"], reply["kind"]))
        return reply["value"]

    def _receive(self, patience_s: float | None = None) -> dict[str, Any]:
        """The next message; {} if there is none for so long."""
        if not select.select([self._end], [], [], patience_s)[0]:
            return {}
        message: dict[str, Any] = json.loads(self._end.recv(_MOST_BYTES))
        if message.get("save") == [self._generation, self._begun]:
            self._outcome = Outcome(message["error"], message["kind"])
        return message


class Direct:
    """A saver in the trainer's own process, which trains on when all is saved. See `Client`."""

    def __init__(self, saver: Saver, board: Board, generation: int = 0) -> None:
        self._saver = saver
        self._board = board
        self._generation = generation
        self._begun = 0
        self._outcome = Outcome()

    def claim(self) -> int:
        return self._saver.claim()

    def condemn(self, attempt: str, step: int, reason: str, place: int = 0) -> None:
        self._saver.condemn(attempt, step, reason, place)

    def acquit(self, attempt: str, step: int, place: int = 0) -> None:
        self._saver.acquit(attempt, step, place)

    def begin(self, snapshot: Snapshot, metrics: dict[str, float], place: int = 0) -> None:
        self.wait()
        self._begun += 1
        self._board.held = snapshot.slot + 1
        self._outcome = self._saver.save(snapshot, self._begun, metrics, place)
        self._saver.tidy()

    @property
    def busy(self) -> bool:
        return False

    def wait(self) -> None:
        outcome, self._outcome = self._outcome, Outcome()
        if outcome.error:
            raise error_of(outcome)


def serve(end: socket.socket, saver: Saver, board: Board) -> None:
    """A saver's life: do what is asked for, until it is told to end.

    :param end: the saver's end of the pair of sockets.
    """
    send(end, born=os.getpid())

    def told(generation: int, number: int, outcome: Outcome) -> None:
        send(end, save=[generation, number], **asdict(outcome))
        board.saving = 0

    def save(snapshot: Snapshot, number: int, metrics: dict[str, float], place: int) -> None:
        try:
            outcome = saver.save(snapshot, number, metrics, place)
        except Exception as error:  # the store is gone, say
            outcome = Outcome(f"{type(error).__name__}: {error}")
        told(snapshot.generation, number, outcome)
        saver.tidy()

    def settle(generation: int, number: int) -> None:
        try:
            outcome = saver.interrupted(generation, number)
        except Exception as error:
            board.held = 0
            outcome = Outcome(f"{type(error).__name__}: {error}")
        told(generation, number, outcome)

    with ThreadPoolExecutor(1) as saving:
        broken = board.saving_generation, board.saving
        if broken[1] and broken == (board.asked_generation, board.asked):  # else what was asked for is still to be read
            saving.submit(settle, *broken)
        while True:
            # What is read is gone: so that this process may die at any moment, it says first that it has read it.
            message = json.loads(end.recv(_MOST_BYTES, socket.MSG_PEEK))
            if message["do"] == "save":
                asked = message["snapshot"]["generation"], message["number"]
                known = asked <= (board.asked_generation, board.asked)
                if not known:
                    board.asked_generation, board.asked = asked
            end.recv(_MOST_BYTES)
            match message["do"]:
                case "save":
                    if not known:  # else one that died had read it, or it was called off before
                        snapshot = Snapshot(**message["snapshot"])
                        saving.submit(save, snapshot, message["number"], message["metrics"], message["place"])
                case "over":
                    generation = message["generation"]
                    last = board.asked if board.asked_generation == generation else 0
                    why = f"the trainer of rank {message['rank']} died before it could save"
                    saver.call_off(generation, last + 1, why)
                    if board.saving_generation == generation and board.saving > last:
                        board.held = 0
                        told(generation, last + 1, Outcome(why))
                case "last":
                    saving.submit(saver.last, message["timeout_s"])
                case "end":
                    saving.shutdown()
                    saver.release()
                    return
                case do:
                    fields = {key: value for key, value in message.items() if key not in ("do", "token")}
                    try:
                        reply = {"value": getattr(saver, do)(**fields), "error": ""}
                    except Exception as error:
                        reply = {"error": str(error), "kind": type(error).__name__}
                    send(end, token=message["token"], **reply)


def error_of(outcome: Outcome) -> Exception:
    """The error that an outcome tells of."""
    kind = getattr(errors, outcome.kind, None)
    return kind(outcome.error) if isinstance(kind, type) and issubclass(kind, Exception) else SaveError(outcome.error)


def send(end: socket.socket, **message: Any) -> None:
    end.send(packed(**message))


def packed(**message: Any) -> bytes:
    return json.dumps(message).encode()
