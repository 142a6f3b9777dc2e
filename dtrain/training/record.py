"""`Record`: what is written down of a run's steps, and shown to whoever looks on. Rank 0 keeps it."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.config import Config
from dtrain.observe.events import Events, Metrics, say
from dtrain.observe.progress import Progress
from dtrain.observe.report import growing_gap
from dtrain.training.selection import Selection
from dtrain.training.slow import Stragglers
from dtrain.training.step import Step


class Record:
    """Of one generation.

    :param shares: how many micro-batches of a step each process has.
    :param done: steps that are behind us.
    :param total: steps of the whole run.
    :param committed: the step of the newest checkpoint.
    """

    def __init__(
        self, config: Config, events: Events, shares: Sequence[int], *, done: int, total: int, committed: int
    ) -> None:
        self._config = config
        self._events = events
        self._total = total
        self._metrics = Metrics(config.local_dir)
        self._progress = Progress(done, total, config.unit, committed)
        self._stragglers = Stragglers(shares)
        self._said: set[str] = set()

    def finished(self, step: Step, committed: int) -> None:
        """A step was. :param committed: the step of the newest checkpoint."""
        loss = step.loss
        # The loss of a step that the optimizer hasn't taken isn't one of the training's.
        self._metrics.write(step.number, ({"skipped": True} if step.skipped else {"loss": loss}) | step.values)
        self._progress.committed(committed)
        self._progress.step(step.number, loss, step.totals.count)

    def compare(self, step: int, selection: Selection) -> None:
        """Say, once, if what models are chosen by is not among what was measured after a step."""
        if selection.measured_at != step:
            return
        for option, criterion in self._config.criteria().items():
            if criterion.metric not in selection.measured and option not in self._said:
                self._said.add(option)
                self._events.warn(
                    f"step {step} has measured {', '.join(selection.measured)}, and {option} goes by "
                    f"{criterion.metric!r}, which is not among them"
                )

    def name_stragglers(self, own_s: Sequence[float], step_s: float) -> None:
        """Say which ranks hold up the others. See `Stragglers.stepped`."""
        for rank, (own, middle) in self._stragglers.stepped(own_s, step_s).items():
            self._events.emit("slow", rank=rank, own_s=own, middle_s=middle)
            say(
                f"rank {rank} holds up the others: it is at work by itself for {1000 * own:.0f} ms of a step, and most "
                f"ranks for {1000 * middle:.0f} ms"
            )

    def flush(self) -> None:
        """Have what was written down on the disk, with the checkpoint that comes."""
        self._metrics.flush()

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()

    def sum_up(self, done: int, selection: Selection) -> None:
        """Say how it ended, and what is the best of it."""
        ended = "finished" if done >= self._total else "stopped"
        why = f": {selection.ended}" if selection.ended else ""
        say(f"{ended}: step {done} of {max(self._total, done)}, saved{why}")
        if selection.ended:
            if self._config.resume_stopped:
                say("the next start goes on once more, as resume_stopped=True")
            else:
                say("it stays stopped when it is started again; Config(resume_stopped=True) goes on")
        if (best := self._config.keep_best) and selection.best:
            value, step = selection.best[0]
            say(f"the best {best.metric} is {value:g}, after step {step}; dtrain checkpoint best {self._config.dir}")
        if gap := growing_gap(self._config.local_dir):
            say(gap)
