"""`Run`: what a training function is given.

It ties the loop to everything else: the ranks, the data, the checkpoints, and the people who look on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import default_collate

from dtrain.checkpoint.manager import Manager
from dtrain.checkpoint.replicas import Replicas
from dtrain.checkpoint.snapshot import Snapshots
from dtrain.checkpoint.state import State
from dtrain.config import Config
from dtrain.elastic.page import Phase
from dtrain.elastic.supervisor import Life
from dtrain.errors import UsageError
from dtrain.observe.events import Events
from dtrain.training.data import Collate, Data, Dataset
from dtrain.training.ema import EMA
from dtrain.training.evaluate import Metric, Outputs, pair
from dtrain.training.exactness import make_deterministic
from dtrain.training.exchange import Exchange
from dtrain.training.folder import open_folders
from dtrain.training.loop import Loop
from dtrain.training.parallel import Hook, Parallel
from dtrain.training.precision import Precision
from dtrain.training.random import set_generators
from dtrain.training.sources import Sources
from dtrain.training.step import Step
from dtrain.training.validation import Validation


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
        self._state = State()
        exchange = Exchange()
        config.check_world(self.world_size)
        storages = [config.storage(), *filter(None, [config.local_storage()])]
        if config.reduction == "exact":
            make_deterministic(device)
        self._precision = Precision(config, device)
        shard_size = config.shard_size or life.group.placement.local_world_size
        self._parallel = Parallel(config, device, self._precision, exchange, shard_size)
        self._sources = Sources(config, device, self._parallel)
        open_folders(config, storages)
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
        mark = functools.partial(self._page.mark, Phase.VALIDATION)
        self._validation = Validation(
            config, self._precision, self._sources, self._events, mark, compare=life.generation == 0
        )
        self._loop = Loop(
            config,
            life,
            events=self._events,
            state=self._state,
            sources=self._sources,
            parallel=self._parallel,
            precision=self._precision,
            exchange=exchange,
            manager=Manager(storages, life.client, life.slots, snapshots, self._events),
        )
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
        yield from self._validation.batches(name, dataset, collate)
        self.alive()

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        metrics: Mapping[str, Metric] | Metric,
        *,
        name: str = "val",
        outputs: Outputs = pair,
        collate: Collate = default_collate,
        average: EMA | None = None,
    ) -> dict[str, Any]:
        """Measure a model on held-out data. All ranks must reach it.

        Each sample is used once, and the result is the same on any number of ranks. The training goes on as if nothing
        had been measured: random numbers, modes and running means are what they were. After `step.update`, numbers go
        to the step's log, and to `Config.keep_best` and `Config.early_stop`: a model that is one of the best is saved
        at the end of the step, and a run that is to stop ends with it.

        :param metrics: torchmetrics objects, or anything with `update`, `compute` and `reset`, by name; or one of them
            whose `compute` gives several by name. They are reset before and after.
        :param name: stands before the names of the results, with a slash.
        :param outputs: what metrics are given, as a tuple; by default `(model(inputs), targets)` of a batch that is a
            pair. It is sent to rank 0: of a language model, take sums rather than logits.
        :param average: the model has these weights meanwhile.
        :returns: numbers, and tensors of those that aren't one, by name, as in `"val/accuracy"`.
        :raises UsageError: it comes between a step's first micro-batch and its update, or would choose a model by the
            data that it is trained on.
        :raises DataError: the data set has less samples than there are ranks.
        """
        self._loop.before_measuring()
        if average is not None and not any(average is value for value in self._state.objects.values()):
            raise UsageError(
                "evaluate(average=...): that isn't tracked, and would begin anew after a failure: run.track it"
            )
        with nullcontext() if average is None else average.applied():
            values = self._validation.measure(model, dataset, metrics, name, outputs, collate)
        self.alive()
        self._loop.learn(values)
        return values

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best model so far, by `Config.keep_best`; None if there is none. It is a checkpoint
        at the end of its step: `dtrain.checkpoint.load(run.config.dir, {"model": model}, step="best")`."""
        return self._loop.best

    def track(self, **objects: Any) -> None:
        """Make objects part of every checkpoint: models, optimizers, schedulers, a GradScaler, a `torch.Generator`,
        and anything else with `state_dict` and `load_state_dict`, the same on all ranks.

        A GradScaler that is tracked is also used, by `step.backward` and `step.update`.

        :raises UsageError: an object has no state, or a name is taken.
        """
        if self._loop.started:
            raise UsageError("track comes before the first step: what is tracked later would not be restored")
        self._state.track(objects)

    def stop(self) -> None:
        """End `steps` after the step that is under way or the one after it, on all ranks alike, with a checkpoint."""
        self._loop.stop = True

    def steps(self, total: int) -> Iterator[Step]:
        """The steps that are left of `total`: restores the newest checkpoint, and saves as configured.

        All ranks must go through it.

        :raises NoGoodCheckpoint: there are checkpoints, but none can be read.
        :raises StateError: what is tracked isn't what was saved.
        :raises DataError: the data set isn't the one of the checkpoint.
        """
        return self._loop.steps(total)

    def save(self, *, metrics: dict[str, float] | None = None, wait: bool = True) -> None:
        """Commit a checkpoint of the last finished step now. All ranks must reach it.

        What the loop's body changes after it, in the same step, isn't in it: make it the last thing there.

        :param metrics: what the model was measured to be worth, for `Config.keep_best`; equal on all ranks.
        :param wait: False lets the training go on while it is written; an error is raised by the next save, or at the
            end of the run.
        :raises SaveError: it could not be written; the commit before stands.
        :raises UsageError: nothing is restored yet, the step is only half done, or a metric is no number.
        """
        self._loop.save(metrics, wait=wait)

    def close(self) -> None:
        """Save what isn't saved yet, and end the progress line. Called at the end of the loop and of the main."""
        self._loop.close()
        if self._replicas is not None:
            self._replicas.close()

    def alive(self) -> None:
        """Say that the loop is at work, where its body takes longer than `Config.hang_after_s`."""
        self._page.mark(Phase.BODY if self._page.at else Phase.MAIN)

    def _warn_once_a_node(self, message: str) -> None:
        if self.local_rank == 0:
            self._events.warn(message)
        else:
            self._events.emit("warning", message=f"rank {self.rank}: {message}")
