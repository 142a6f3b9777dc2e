"""`Judge`: what follows when a trainer has failed: another try, one without a batch that kills, or the end."""

from __future__ import annotations

from dtrain.checkpoint.snapshot import Board
from dtrain.config import Config
from dtrain.elastic.failure import Failure
from dtrain.elastic.generation import Outcome
from dtrain.elastic.page import Page, Phase

_IN_A_STEP = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE, Phase.BODY)


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
        self._committed = 0
        """The last commit before this generation."""
        self.skipped: tuple[int, ...] = ()

    def begin(self) -> None:
        """A generation."""
        self._page.begin(self._best)
        self._committed = self._board.committed

    def learn(self, outcome: Outcome) -> None:
        """How it ended, as all supervisors see it."""
        self._best, self._stalled, self.skipped = outcome.best, outcome.stalled, outcome.skipped

    def outcome(self, failure: Failure, rank: int, failures: int, asked: int) -> Outcome:
        """:param rank: the one that failed, most often this supervisor's own.
        :param failures: how many generations have failed within the last hour.
        :param asked: the signal for which all are to end anyway; 0 if there is none.
        """
        page, config = self._page, self._config
        known = max(self._best, page.restored)
        # A checkpoint that can't be written doesn't keep the training from new steps, but is no less of a failure.
        progress = self._board.committed > self._committed if failure.unsaved else page.step > known
        stalled = 0 if progress else self._stalled + 1
        cause, skipped = failure.cause, self.skipped
        where = self._where() if not failure.unsaved else ""
        final = failure.final
        if stalled >= config.max_stalled and not (final or asked):
            if config.skip_poison_batch and page.at and page.phase in _IN_A_STEP and not failure.unsaved:
                cause = f"{cause}{where}, the last of {stalled} failures without a new step: step {page.at} is skipped"
                stalled, skipped = 0, (*skipped, page.at)
            else:
                what = "checkpoint" if failure.unsaved else "step"
                cause = f"no new {what} in {stalled} generations; the last time rank {rank} failed: {cause}{where}"
                final = True
        if failures >= config.max_failures_per_hour and not (final or asked):
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
            skipped=skipped,
            signal=asked,
        )

    def _where(self) -> str:
        page = self._page
        if not page.at or page.phase not in _IN_A_STEP:
            return ""
        batch = f"micro-batch {page.micro_batch} of " if page.micro_batch >= 0 else ""
        return f" (in {batch}step {page.at})"
