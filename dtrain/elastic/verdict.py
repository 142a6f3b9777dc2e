"""`Judge`: what follows when a trainer has failed: another try, one without a batch that kills, or the end."""

from __future__ import annotations

from dtrain.checkpoint.slots import Board
from dtrain.config import Config
from dtrain.elastic.failure import Failure
from dtrain.elastic.generation import Outcome
from dtrain.elastic.page import Page, Phase
from dtrain.elastic.watchdog import Report

_IN_A_BATCH = (Phase.BETWEEN, Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)


class Judge:
    """One supervisor's, for all generations of its group.

    :ivar skipped: steps that are passed over.
    """

    def __init__(self, config: Config, page: Page, board: Board) -> None:
        self._config = config
        self._page = page
        self._board = board
        self._best = 0
        self._stalled = 0
        self._at = 0
        self._committed = 0
        """The last commit before this generation."""
        self.skipped: tuple[int, ...] = ()

    def begin(self, generation: int) -> None:
        self._page.begin(generation, self._best)
        self._committed = self._board.committed

    def learn(self, outcome: Outcome) -> None:
        """How it ended, as all supervisors see it."""
        self._best, self._stalled, self.skipped = outcome.best, outcome.stalled, outcome.skipped
        self._at = outcome.at

    def outcome(self, failure: Failure, rank: int, failures: int, asked: int, place: Report | None) -> Outcome:
        """:param rank: the one that failed, most often this supervisor's own.
        :param place: where it was, if it's another one.
        :param failures: how many generations have failed within the last hour.
        :param asked: the signal for which all are to end anyway; 0 if there is none.
        """
        page, config = self._page, self._config
        known = max(self._best, page.restored)
        # A checkpoint that can't be written doesn't keep the training from new steps, but is no less of a failure.
        progress = self._board.committed > self._committed if failure.unsaved else page.step > known
        stalled = 0 if progress else self._stalled + 1
        cause, skipped = failure.cause, self.skipped
        if failure.over:  # to pass over a step is to come further
            stalled, skipped = 0, (*skipped, failure.over)
        step, batch, phase = (
            (place.step, place.micro_batch, place.phase) if place else (page.at, page.micro_batch, page.phase)
        )
        at = step if step > known and phase in _IN_A_BATCH and not (failure.unsaved or failure.over) else 0
        where = f" (in {f'micro-batch {batch} of ' if batch >= 0 else ''}step {step})" if at else ""
        at = at if stalled == 1 or at == self._at else 0
        final = failure.final
        if stalled >= config.max_stalled and not (final or asked):
            # Two steps in a row that kill are more likely a machine, or a program, that kills.
            if config.skip_poison_batch and at and at - 1 not in skipped:
                cause = f"{cause}{where}, the last of {stalled} failures without a new step: step {at} is skipped"
                stalled, skipped = 0, (*skipped, at)
            else:
                what = "checkpoint" if failure.unsaved else "step"
                cause = f"no new {what} in {stalled} generations; the last time rank {rank} failed: {cause}{where}"
                final = True
        if failures >= config.max_failures_per_hour and not (final or asked or failure.over):
            cause = (
                f"{failures + 1} failures within an hour, and max_failures_per_hour={config.max_failures_per_hour}; "
                f"the last: rank {rank} failed: {cause}"
            )
            final = True
        return Outcome(
            kind="ended" if asked else "stopped" if final else "failed",
            rank=rank,
            cause=cause,
            trace=failure.trace,
            best=max(known, page.step),
            stalled=stalled,
            at=at,
            skipped=skipped,
            signal=asked,
        )
