"""`Run`: what a training function is given.

It ties the loop to everything else: the ranks, the data, the checkpoints, and the people who look on.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import default_collate

from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.replicas import Replicas
from dtrain.checkpoint.schedule import Action, Schedule
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State, bare
from dtrain.config import SAME_BITS, Config, Interval
from dtrain.elastic.page import STOPPED, Phase
from dtrain.elastic.supervisor import Life
from dtrain.errors import UsageError
from dtrain.observe.events import Events, Metrics, say
from dtrain.observe.progress import Progress
from dtrain.training.data import Collate, Data, Dataset
from dtrain.training.exactness import inexact_parts, make_deterministic, name_changed_buffers
from dtrain.training.exchange import Exchange
from dtrain.training.folder import open_folders
from dtrain.training.order import block
from dtrain.training.parallel import Hook, Parallel, same_buffers
from dtrain.training.precision import Precision
from dtrain.training.random import set_generators
from dtrain.training.slow import Stragglers
from dtrain.training.sources import Sources
from dtrain.training.step import Flags, Step


class Run:
    """One rank's view of a run, in one generation.

    :ivar rank: this process's number among `world_size`.
    :ivar local_rank: its number on this machine.
    :ivar device: where the model and the batches go.
    """

    def __init__(self, config: Config, device: torch.device, life: Life) -> None:
        self.config = config
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = life.group.placement.local_rank
        self.device = device
        self._page = life.page
        self._generation = life.generation
        self._state = State()
        self._exchange = Exchange()
        local = config.local_save_every
        self._schedule = Schedule(
            Interval.parse(config.save_every),
            Interval.parse(config.snapshot_every, "snapshot_every"),
            lambda step: self._sources.epoch_after(step),
            mtbf_s=config.mtbf_hours * 3600,
            early=config.early_save,
            local_save_every=None if local is None else Interval.parse(local, "local_save_every"),
        )
        self._skipped = set(life.skipped)
        self._stop = False
        self._started = False
        self._done = 0
        self._saved = -1
        self._committed = 0
        """Where the run stood when it was restored."""
        self._step: Step | None = None
        self._progress: Progress | None = None
        self._metrics: Metrics | None = None
        config.check_world(self.world_size)
        self._storages = [config.storage(), *filter(None, [config.local_storage()])]
        if config.reduction == "exact":
            make_deterministic(device)
        self._precision = Precision(config, device)
        shard_size = config.shard_size or life.group.placement.local_world_size
        self._parallel = Parallel(config, device, self._precision, self._exchange, shard_size)
        self._sources = Sources(config, device, self._parallel)
        ranks = self._parallel.world_size
        self._stragglers = Stragglers([len(block(config.micro_batches, rank, ranks)) for rank in range(ranks)])
        open_folders(config, self._storages)
        self._events = Events(config.local_dir)
        local_world_size = life.group.placement.local_world_size
        several = life.slots.replicas and life.group.placement.nodes > 1
        self._replicas = Replicas(life.slots, local_world_size, self._warn_once_a_node) if several else None
        if config.replicate_snapshots and self._replicas is None and self.is_first:
            self._events.warn("replicate_snapshots=1: there is no other node now that snapshots could be sent to")
        snapshots = Snapshots(
            life.slots,
            rank=self.rank,
            world_size=self.world_size,
            local_world_size=local_world_size,
            generation=life.generation,
            spill=config.local_dir,
            say=self._warn_once_a_node,
            replicas=self._replicas,
        )
        self._manager = Manager(self._storages, life.client, life.slots, snapshots, self._events)
        set_generators(config.seed, "start")

    @property
    def is_first(self) -> bool:
        """True on rank 0, the one to print or to write."""
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh | None:
        """The ranks as FSDP and HSDP see them, with the dimensions `replicate`, `shard` and `tensor`, as far as they
        are there; None under `parallel="none"` and `"ddp"`."""
        return self._parallel.mesh

    def parallelize(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[type[nn.Module]] | None = None,
        tensor_parallel: Hook | None = None,
    ) -> nn.Module:
        """Spread a model over the ranks, as the config says. All ranks must reach it, before the optimizer is made.

        The names in the state dict stay those of the bare model. A model that was made under
        `torch.device("meta")` is filled here, block by block, by its modules' `reset_parameters`, with the same values
        on any number of ranks.

        :param blocks: classes of the blocks that are sharded, recomputed and compiled as units; None takes the class
            that is repeated in a list and holds the most parameters.
        :param tensor_parallel: called as `tensor_parallel(model, mesh)` with the mesh of the ranks that share
            micro-batches, before all else; returns the model. It goes with `Config.tensor_parallel`.
        :raises UsageError: the model has no such blocks, or can't be filled.
        """
        return self._parallel.wrap(model, blocks, tensor_parallel)

    @property
    def scaler(self) -> GradScaler | None:
        """With `precision="fp16"`: what scales the losses, if none of the user's own is tracked."""
        return self._precision.scaler

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, for forward passes outside of `step.micro_batches`, where it holds anyway."""
        return self._precision.autocast()

    def data(
        self,
        dataset: Dataset | Iterable[Any],
        *,
        collate: Collate = default_collate,
        shuffle: bool = True,
        workers: int = 0,
        name: str = "data",
    ) -> Data:
        """A data set in the order in which this run uses it, to be given to `step.micro_batches`.

        :param dataset: map-style: `dataset[i]` is a sample; random numbers that it draws follow from the sample's
            place in the training. Or an iterable one with `state_dict` and `load_state_dict`, which is in charge of
            its order itself: its run can go on only with as many ranks as before.
        :param collate: makes a batch of a list of samples.
        :param shuffle: False keeps the data set's own order.
        :param workers: processes of each rank that load samples ahead; 0 loads them in the loop.
        :param name: tells several data sets apart.
        :raises DataError: it is empty, smaller than a global batch, or has no state that could be saved.
        """
        return self._sources.add(name, dataset, collate, shuffle=shuffle, workers=workers)

    def once(self, dataset: Dataset, *, collate: Collate = default_collate, name: str = "validation") -> Iterator[Any]:
        """This rank's batches of a data set of which all ranks together take each sample once: for validation.

        All ranks must reach it, and go through it to its end. Random numbers of a sample follow from it; the training's
        are as if nothing had been drawn. `torch.no_grad()`, `model.eval()` and `run.autocast()` are for the caller.

        :param name: for messages.
        :raises DataError: it has less samples than there are ranks.
        """
        for batch in self._sources.once(name, dataset, collate):
            self._page.mark(Phase.VALIDATION)
            yield batch
        self.alive()

    def track(self, **objects: Any) -> None:
        """Make objects part of every checkpoint: models, optimizers, schedulers, a GradScaler, a `torch.Generator`,
        and anything else with `state_dict` and `load_state_dict`, the same on all ranks.

        A GradScaler that is tracked is also used, by `step.backward` and `step.update`.

        :raises UsageError: an object has no state, or a name is taken.
        """
        if self._started:
            raise UsageError("track comes before the first step: what is tracked later would not be restored")
        self._state.track(objects)

    def stop(self) -> None:
        """End `steps` after the step that is under way or the one after it, on all ranks alike, with a checkpoint."""
        self._stop = True

    def steps(self, total: int) -> Iterator[Step]:
        """The steps that are left of `total`: restores the newest checkpoint, and saves as configured.

        All ranks must go through it.

        :raises NoGoodCheckpoint: there are checkpoints, but none can be read.
        :raises StateError: what is tracked isn't what was saved.
        :raises DataError: the data set isn't the one of the checkpoint.
        """
        if self._started:
            raise UsageError("steps was called before; a run has one loop")
        self._started = True
        tracked = (value for value in self._state.objects.values() if isinstance(value, GradScaler))
        scaler = next(tracked, self._precision.scaler)
        if scaler is not None and scaler is self._precision.scaler:
            self._state.track({"scaler": scaler})
        if self._parallel.exact and self.is_first:
            modules = [model.module for model in self._parallel.models]
            for part in inexact_parts(self._state, modules):
                self._events.warn(f"reduction='exact': {part}")
            name_changed_buffers(modules, lambda part: self._events.warn(f"reduction='exact': {part}"))
        self._restore()
        if self.is_first:
            self._metrics = Metrics(self.config.local_dir)
            self._progress = Progress(self._done, total, self.config.unit, self._committed)
        end = False
        for number in range(self._done + 1, total + 1):
            if number in self._skipped:
                self._pass_over(number)
                continue
            step = Step(
                number,
                seed=self.config.seed,
                micro_batches=self.config.micro_batches,
                parallel=self._parallel,
                precision=self._precision,
                exchange=self._exchange,
                scaler=scaler,
                ask=self._ask,
                before_update=self._manager.complete,
                check=self._state.check,
                page=self._page,
            )
            self._step = step
            started = time.monotonic()
            try:
                yield step
            except GeneratorExit:  # the loop was left; its last step counts if the weights are those after it
                if step.updated:
                    self._finish(step)
                raise
            self._finish(step)
            self._same_buffers()
            end = step.totals.end
            if end or step.totals.stop:
                break
            seconds = time.monotonic() - started
            self._schedule.stepped(seconds, saving=self._manager.busy)
            self._name_stragglers(step.totals.own_s, seconds)
            match Action(step.totals.action):
                case Action.SAVE:
                    self._save()
                case Action.LOCAL_SAVE:
                    self._local_save()
                case Action.SNAPSHOT:
                    self._snapshot()
        self.close()
        if self.is_first:
            ended = "finished" if self._done >= total else "stopped"
            say(f"{ended}: step {self._done} of {max(total, self._done)}, saved")
        if end and self._done < total:
            # What comes behind the loop is for a training that is done, or was stopped by its own code.
            self._page.stop = STOPPED
            raise SystemExit(0)

    def save(self, *, metrics: dict[str, float] | None = None, wait: bool = True) -> None:
        """Commit a checkpoint of the last finished step now. All ranks must reach it.

        What the loop's body changes after it, in the same step, isn't in it: make it the last thing there.

        :param metrics: what the model was measured to be worth, for `Config.keep_best`; equal on all ranks.
        :param wait: False lets the training go on while it is written; an error is raised by the next save, or at the
            end of the run.
        :raises SaveError: it could not be written; the commit before stands.
        :raises UsageError: nothing is restored yet, the step is only half done, or a metric is no number.
        """
        metrics = _checked(metrics, self.config) if metrics else None
        if not self._started:
            raise UsageError("save comes after run.steps has begun, which restores what was saved before")
        step = self._step
        if step is not None and step.number > self._done:  # called inside the loop
            if not step.updated:
                raise UsageError(
                    f"step {step.number}: save comes after step.update, when the weights are those after it"
                )
            self._finish(step)
        self._save(metrics)
        if wait:
            self._manager.wait()

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        if self._saved == self._done and not metrics:
            return
        self._page.mark(Phase.SAVE)
        if self._metrics is not None:
            self._metrics.flush()
        self._same_buffers()
        self._manager.save(self._state, self._done, self._position(), metrics)
        self._saved = self._done
        self._schedule.saved()
        self._schedule.snapped(self._done, self._manager.stall_s)

    def _local_save(self) -> None:
        self._page.mark(Phase.SAVE)
        if self._metrics is not None:
            self._metrics.flush()
        self._manager.save(self._state, self._done, self._position(), local=True)
        self._schedule.saved(local=True)
        self._schedule.snapped(self._done, self._manager.stall_s)

    def _snapshot(self) -> None:
        self._page.mark(Phase.SAVE)
        if self._metrics is not None:
            self._metrics.flush()
        self._manager.snapshot(self._state, self._done, self._position())
        self._schedule.snapped(self._done, self._manager.stall_s)

    def close(self) -> None:
        """Save what isn't saved yet, and end the progress line. Called at the end of the loop and of the main."""
        if self._step is not None and self._step.begun and not self._step.updated:
            self._events.warn(
                f"the loop was left in the middle of step {self._step.number}, whose forward passes may have changed "
                f"the model: it is not saved, and the last checkpoint is that of step {max(0, self._saved)}"
            )
        elif self._started and self._done > 0:
            self._step = None
            self._save()
            self._page.at = 0
            self._page.mark(Phase.END)
            self._manager.wait()
            if self._schedule.skipped:
                self._events.warn(
                    f"{self._schedule.skipped} checkpoints were not made, as the one before was still being written: "
                    "save_every is shorter than a save takes"
                )
                self._schedule.skipped = 0
        self._sources.close()
        if self._replicas is not None:
            self._replicas.close()
        self._page.at = 0
        self._page.mark(Phase.MAIN)
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def _pass_over(self, number: int) -> None:
        """Leave out a step that has killed several generations."""
        ids = self._sources.skip(number)
        self._done = number
        if self._page.step == self._page.restored:
            self._page.restored = number  # the first step that is computed is still to come, and may take long
        self._page.finished(number)
        if self.is_first:
            self._events.emit("skipped", step=number, samples=ids)
            say(f"step {number} is skipped; the ids of its samples are in events.jsonl")
        self._save()  # it may have been due here, and this isn't to be found out again

    def _name_stragglers(self, own_s: Sequence[float], step_s: float) -> None:
        if not self.is_first:
            return
        for rank, (own, middle) in self._stragglers.stepped(own_s, step_s).items():
            self._events.emit("slow", rank=rank, own_s=own, middle_s=middle)
            say(
                f"rank {rank} holds up the others: it is at work by itself for {1000 * own:.0f} ms of a step, and most "
                f"ranks for {1000 * middle:.0f} ms"
            )

    def alive(self) -> None:
        """Say that the loop is at work, where its body takes longer than `Config.hang_after_s`."""
        self._page.mark(Phase.BODY if self._page.at else Phase.MAIN)

    def _ask(self) -> Flags:
        assert self._step is not None
        due = self._schedule.due(self._step.number, busy=self._manager.busy) if self.is_first else Action.NOTHING
        return self._stop, self._page.stop > 0, due

    def _warn_once_a_node(self, message: str) -> None:
        if self.local_rank == 0:
            self._events.warn(message)
        else:
            self._events.emit("warning", message=f"rank {self.rank}: {message}")

    def _same_buffers(self) -> None:
        models = [bare(model.module) for model in self._parallel.models]
        modules = dict.fromkeys([*models, *self._state.modules().values()])
        same_buffers(buffer for module in modules for buffer in module.buffers())

    def _finish(self, step: Step) -> None:
        if self._done == step.number:  # by a save inside the loop
            return
        step.finish()
        self._done = step.number
        self._page.finished(step.number)
        if self.is_first and step.number == self._page.best + 1 and self._generation:
            self._events.emit("caught_up", step=step.number, generation=self._generation)
        if self._metrics is not None and self._progress is not None:
            loss = step.loss
            self._metrics.write(step.number, {"loss": loss} | step.values)
            self._progress.committed(self._manager.committed)
            self._progress.step(step.number, loss, step.totals.count)

    def _restore(self) -> None:
        self._page.mark(Phase.RESTORE)
        self._manager.claim()
        self._events.emit(
            "started",
            rank=self.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            world_size=self.world_size,
            generation=self._generation,
            epoch=self._manager.epoch,
        )
        self._sources.check()
        restored = self._manager.restore(self._state)
        if restored is not None:
            self._sources.restore(restored.position["data"])
            self._skipped |= set(restored.position.get("skipped", ()))
            self._done = self._page.restored = restored.step
            self._saved = restored.step if restored.committed else -1
            self._committed = restored.newest
        if self.is_first:
            ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
            say(f"{self.config.dir}: {f'restored step {self._done}' if restored else 'nothing saved yet'}, {ranks}")

    def _position(self) -> dict[str, Any]:
        return {
            "step": self._done,
            "samples": self._done * self.config.global_batch,
            "config": {name: getattr(self.config, name) for name in SAME_BITS},
            "data": self._sources.positions(),
            "skipped": sorted(self._skipped),
        }


def _checked(metrics: Mapping[str, Any], config: Config) -> dict[str, float]:
    """:raises UsageError: one of them is no number, or that of `keep_best` is missing."""
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"save(metrics={{{name!r}: {value!r}}}): must be a number") from error
    if config.keep_best is not None and config.keep_best.metric not in found:
        raise UsageError(
            f"save(metrics={found}): keep_best goes by {config.keep_best.metric!r}, which is not among them; give it "
            "too, or change keep_best"
        )
    return found
