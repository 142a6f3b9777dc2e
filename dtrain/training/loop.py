"""`Loop`: a run's steps, and all that comes between two of them."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch.amp import GradScaler
from torch.optim import Optimizer

from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.schedule import Action
from dtrain.checkpoint.state import State, bare
from dtrain.config import Config, Interval
from dtrain.elastic.generation import run_name
from dtrain.elastic.page import STOPPED, Phase
from dtrain.elastic.supervisor import Life
from dtrain.errors import UsageError
from dtrain.observe.events import Events, say
from dtrain.training.copies import Copies
from dtrain.training.exactness import inexact_parts, name_changed_buffers
from dtrain.training.exchange import Exchange
from dtrain.training.given import check_metrics, refuse_by_hand
from dtrain.training.guards import Watch
from dtrain.training.parallel import Buffers, Parallel, same_on_all_ranks
from dtrain.training.precision import Precision
from dtrain.training.record import Record
from dtrain.training.saves import Saves
from dtrain.training.sources import Sources
from dtrain.training.step import Flags, Step
from dtrain.training.twice import Twice


class Loop:
    """One rank's, in one generation.

    :ivar stop: whether this rank's code wants it to end.
    """

    def __init__(
        self,
        config: Config,
        life: Life,
        *,
        events: Events,
        state: State,
        sources: Sources,
        parallel: Parallel,
        precision: Precision,
        exchange: Exchange,
        manager: Manager,
    ) -> None:
        self._config = config
        self._page = life.page
        self._generation = life.generation
        self._events = events
        self._state = state
        self._sources = sources
        self._parallel = parallel
        self._precision = precision
        self._exchange = exchange
        self._manager = manager
        self._skipped = set(life.skipped)
        first = life.generation == 0 and life.group.placement.restarts == 0
        self._saves = Saves(config, manager, state, sources, self._skipped, self._before_saving, first=first)
        notes = functools.partial(life.group.notes_store, run_name(config))
        self._copies = Copies(parallel, config.guards.compare_every, exchange, events, notes, manager.forget)
        self._watch = Watch(
            config.guards, parallel, sources, events, self._skipped, self._copies.compare, manager.forget
        )
        self._saves.watch = self._watch
        exchange.looks = self._watch.looks or config.guards.compare_every is not None
        self._record: Record | None = None
        self._step: Step | None = None
        self._rehearses = False
        """Whether the step under way is computed to be compared, and will be computed again."""
        self._rehearsed: dict[str, float] = {}
        """What was measured in it, should the loop be left with it."""
        self._found_better = False
        self._buffers: Buffers | None = None
        self.stop = False
        self.started = False

    def steps(self, total: int) -> Iterator[Step]:
        """See `Run.steps`."""
        if self.started:
            raise UsageError("steps was called before; a run has one loop")
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise UsageError(f"steps({total!r}) must be a number of steps, 1 or more")
        self.started = True
        tracked = {name: value for name, value in self._state.objects.items() if isinstance(value, GradScaler)}
        scaler = next((each for each in tracked.values() if each.is_enabled()), self._precision.scaler)
        if scaler is not None and scaler is self._precision.scaler:
            if tracked:
                raise UsageError(
                    f"track({next(iter(tracked))}=...): this GradScaler is switched off, and precision='fp16' needs "
                    "one: enable it, or leave it out, and the run has one of its own"
                )
            self._state.track({"scaler": scaler})
        if self._parallel.exact and dist.get_rank() == 0:
            modules = [model.module for model in self._parallel.models]
            for part in inexact_parts(self._state, modules):
                self._events.warn(f"reduction='exact': {part}")
            name_changed_buffers(modules, lambda part: self._events.warn(f"reduction='exact': {part}"))
        if self._config.guards.verify_restore and not self._sources.can_rewind:
            raise UsageError("verify_restore=True: an iterable data set can't give the samples of a step a second time")
        for option in ("save_every", "local_save_every"):
            every = getattr(self._config, option)
            if every is not None and Interval.parse(every, option).unit == "epochs" and not self._sources.map_style:
                raise UsageError(f"{option}={every!r}: an iterable data set has no epochs; give steps, or a time")
        trained = {id(parameter) for model in self._parallel.models for parameter in model.trained}
        for value in self._state.objects.values():
            if isinstance(value, Optimizer):
                own = {id(parameter) for group in value.param_groups for parameter in group["params"]}
                if not trained or own & trained:  # others may be for something beside
                    refuse_by_hand(value, self._undivided)
        saves = self._saves
        restored = self._restore()
        if dist.get_rank() == 0:
            shares, done, committed = self._parallel.shares(), saves.done, saves.committed
            self._record = Record(self._config, self._events, shares, done=done, total=total, committed=committed)
        verify = restored and self._config.guards.verify_restore
        end = False
        while saves.done < total and not saves.selection.ended:
            if saves.done + 1 in self._skipped:
                self._pass_over(saves.done + 1)
                continue
            started = time.monotonic()
            if verify:
                step = yield from self._twice(saves.done + 1, scaler)
                verify = False
            else:
                step = yield from self._once(saves.done + 1, scaler)
            self._finish(step)
            if self._record is not None:
                self._record.compare(step.number, saves.selection)
            self._same_buffers()
            if self._copies.due(step.number):
                self._copies.compare(step.number)
            end = step.totals.end
            if end or step.totals.stop or saves.selection.ended:
                break
            seconds = time.monotonic() - started
            saves.schedule.stepped(seconds, saving=self._manager.busy)
            if self._record is not None:
                self._record.name_stragglers(step.totals.own_s, seconds)
            saves.act(Action.SAVE if self._found_better else Action(step.totals.action))
            self._found_better = False
        self.close()
        if self._record is not None:
            self._record.sum_up(saves.done, saves.selection)
        if end and saves.done < total:
            # What comes behind the loop is for a training that is done, or was stopped by its own code.
            self._page.stop = STOPPED
            raise SystemExit(0)

    def _undivided(self, optimizer: Optimizer) -> int:
        """The step under way, if its gradients of an optimizer's parameters are still sums; 0 otherwise."""
        step = self._step
        inside = step is not None and step.begun and self._page.at == step.number
        return step.number if step is not None and inside and id(optimizer) not in step.divided else 0

    def _once(self, number: int, scaler: GradScaler | None) -> Generator[Step, None, Step]:
        step = self._step = self._new_step(number, scaler)
        try:
            yield step
        except GeneratorExit:  # the loop was left; its last step counts if the weights are those after it
            if step.updated:
                self._rehearses = False
                self._finish(step)
                self.learn(self._rehearsed)
            raise
        return step

    def _twice(self, number: int, scaler: GradScaler | None) -> Generator[Step, None, Step]:
        """A step that is computed two times from the same state, which must come to the same."""
        twice, losses = Twice(self._state, self._parallel), self._watch.state()
        self._rehearses = True
        step = yield from self._once(number, scaler)
        step.finish()
        self._rehearses, self._rehearsed = False, {}
        twice.back()
        self._watch.load(losses)
        step = yield from self._once(number, scaler)
        twice.compare(number)
        return step

    def _new_step(self, number: int, scaler: GradScaler | None) -> Step:
        return Step(
            number,
            seed=self._config.seed,
            micro_batches=self._config.micro_batches,
            parallel=self._parallel,
            precision=self._precision,
            exchange=self._exchange,
            scaler=scaler,
            ask=self._ask,
            before_update=self._manager.complete,
            check=self._state.check,
            watch=self._watch,
            page=self._page,
        )

    def learn(self, values: Mapping[str, Any]) -> None:
        """Take in what was measured after the update of the step under way."""
        step = self._step
        if step is None or not step.updated or not values:
            return
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        if self._rehearses:
            self._rehearsed |= numbers
            return
        step.log(**numbers)
        self._found_better |= self._saves.selection.learn(step.number, numbers)

    @property
    def best(self) -> tuple[int, float] | None:
        """See `Run.best`."""
        return next(((step, value) for value, step in self._saves.selection.best), None)

    def before_measuring(self) -> None:
        """:raises UsageError: a step is half done."""
        step = self._step
        if step is not None and step.begun and not step.updated:
            raise UsageError(f"step {step.number}: evaluate comes after step.update, or before the first micro-batch")
        self._manager.complete()  # the average may take the place of weights that are still being copied

    def save(self, metrics: Mapping[str, Any] | None, *, wait: bool) -> None:
        """See `Run.save`."""
        measured = check_metrics(metrics, self._config) if metrics else {}
        if not self.started:
            raise UsageError("save comes after run.steps has begun, which restores what was saved before")
        step = self._step
        if step is not None and step.number > self._saves.done:  # called inside the loop
            if not step.updated:
                raise UsageError(
                    f"step {step.number}: save comes after step.update, when the weights are those after it"
                )
            if self._rehearses:
                self._rehearsed |= measured
                return
            self._finish(step)
        if measured:
            self._saves.selection.learn(self._saves.done, measured)
        self._saves.save(measured)
        if wait:
            self._manager.wait()

    def _before_saving(self) -> None:
        """Before each snapshot as well, since any of them may have to be gone on from, or be saved at the end."""
        self._page.mark(Phase.SAVE if self._page.at else Phase.END)
        if self._record is not None:
            self._record.flush()
        self._same_buffers()
        self._copies.compare(self._saves.done)
        self._watch.check_parameters(self._saves.done)
        self._page.mark(Phase.SAVE if self._page.at else Phase.END)

    def close(self) -> None:
        """Save what isn't saved yet, and end the progress line. See `Run.close`."""
        if self._step is not None and self._step.begun and not self._step.updated:
            self._events.warn(
                f"the loop was left in the middle of step {self._step.number}, whose forward passes may have changed "
                f"the model: it is not saved, and the last checkpoint is that of step {max(0, self._saves.saved)}"
            )
        elif self.started and self._saves.done > 0:
            self._step = None
            self._page.at = 0
            self._page.mark(Phase.END)
            self._saves.save()
            self._manager.wait()
            if self._saves.schedule.skipped:
                self._events.warn(
                    f"{self._saves.schedule.skipped} checkpoints were not made, as the one before was still being "
                    "written: save_every is shorter than a save takes"
                )
                self._saves.schedule.skipped = 0
        self._sources.close()
        self._page.at = 0
        self._page.mark(Phase.MAIN)
        if self._record is not None:
            self._record.close()

    def _pass_over(self, number: int) -> None:
        """Leave out a step that has killed several generations, or that a guard has found to be garbage."""
        self._sources.skip(number)
        self._saves.done = number
        if self._page.step <= self._page.restored:
            self._page.restored = number  # the first step that is computed is still to come, and may take long
        self._page.finished(number)
        if dist.get_rank() == 0:
            self._events.emit("skipped", step=number, samples=self._sources.ids(number))
            say(f"step {number} is skipped; the ids of its samples are in events.jsonl")
        self._saves.save()  # it may have been due here, and this isn't to be found out again

    def _ask(self) -> Flags:
        assert self._step is not None
        due = Action.NOTHING
        if dist.get_rank() == 0:
            due = self._saves.schedule.due(self._step.number, busy=self._manager.busy)
        return self.stop, self._page.stop > 0, due

    def _same_buffers(self) -> None:
        if self._buffers is None:
            models = [bare(model.module) for model in self._parallel.models]
            self._buffers = Buffers([*models, *self._state.modules().values()])
        same_on_all_ranks(self._buffers.all())

    def _finish(self, step: Step) -> None:
        if self._saves.done == step.number:  # by a save inside the loop
            return
        step.finish()
        self._saves.done = step.number
        self._page.finished(step.number)
        if dist.get_rank() == 0 and step.number == self._page.best + 1 and self._generation:
            self._events.emit("caught_up", step=step.number, generation=self._generation)
        if self._record is not None:
            self._record.finished(step, self._manager.committed)

    def _restore(self) -> bool:
        """:returns: whether there was anything."""
        self._page.mark(Phase.RESTORE)
        self._manager.claim()
        self._events.emit(
            "started",
            rank=dist.get_rank(),
            pid=os.getpid(),
            host=socket.gethostname(),
            world_size=dist.get_world_size(),
            generation=self._generation,
            epoch=self._manager.epoch,
        )
        self._sources.check()
        restored = self._saves.restore()
        self._copies.begin()
        if restored is not None:
            self._page.restored = restored.step
            self._page.committed = restored.newest
        if dist.get_rank() == 0:
            count = dist.get_world_size()
            ranks = f"{count} rank{'s' if count > 1 else ''}"
            where = f"restored step {self._saves.done}" if restored else "nothing saved yet"
            say(f"{self._config.dir}: {where}, {ranks}")
        return restored is not None
