"""How a run's models are spread over its ranks: `Config.parallel` and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from dtrain.config import Config
from dtrain.errors import ConfigError, UsageError
from dtrain.training.ddp import Replicated
from dtrain.training.exchange import Exchange
from dtrain.training.fsdp import Sharded
from dtrain.training.order import block
from dtrain.training.precision import Precision
from dtrain.training.prepare import Filler, blocks_of, modules_around, recompute
from dtrain.training.wrapped import Wrapped

Hook = Callable[[nn.Module, DeviceMesh], nn.Module]

_BATCH_BYTES = 64 << 20
"""Of tensors that are sent together."""


class Parallel:
    """The ranks, as a mesh, and the models that were spread over it. All ranks must make it.

    :param shard_size: how many ranks share a copy under HSDP, or more where it doesn't divide their number: a part
        never gets larger than it was meant to be.
    :ivar rank: this rank's number among those that have micro-batches of their own.
    :ivar world_size: how many those are.
    :ivar counts: whether this is the rank that counts what its group of tensor-parallel ranks computes.
    :ivar exact: whether sums are to be the same on any number of ranks.
    :ivar models: as the steps see them.
    """

    def __init__(
        self, config: Config, device: torch.device, precision: Precision, exchange: Exchange, shard_size: int
    ) -> None:
        self._config = config
        self._device = device
        self._precision = precision
        self._exchange = exchange
        self.models: list[Wrapped] = []
        self._checked: set[int] = set()
        ranks, tensor = dist.get_world_size(), config.tensor_parallel
        if ranks % tensor:
            raise ConfigError(f"tensor_parallel={tensor} doesn't divide {ranks} ranks; start a multiple of {tensor}")
        self.rank, self.world_size = dist.get_rank() // tensor, ranks // tensor
        self.counts = dist.get_rank() % tensor == 0
        self.exact = config.reduction == "exact"
        self._shards = self.world_size
        if config.parallel == "hsdp":
            least = min(max(2, shard_size), self.world_size)
            self._shards = min(n for n in range(least, self.world_size + 1) if self.world_size % n == 0)
        self.mesh: DeviceMesh | None = None
        if config.parallel in ("fsdp", "hsdp"):
            sizes = {"replicate": self.world_size // self._shards, "shard": self._shards, "tensor": tensor}
            if sizes["replicate"] == 1:
                del sizes["replicate"]
            if tensor == 1:
                del sizes["tensor"]
            self.mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def wrap(
        self, model: nn.Module, classes: Sequence[type[nn.Module]] | None, tensor_parallel: Hook | None
    ) -> nn.Module:
        """See `Run.parallelize`."""
        config = self._config
        if (tensor_parallel is None) != (config.tensor_parallel == 1):
            raise UsageError(
                f"parallelize(tensor_parallel={tensor_parallel!r}) with Config(tensor_parallel="
                f"{config.tensor_parallel}): the number of ranks and the function go together; give both or neither"
            )
        for name, part in model.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
                raise UsageError(
                    f"parallelize: {name or 'the model'} has sparse=True, whose gradients can't be summed up "
                    "and clipped here; leave it out"
                )
            if isinstance(part, nn.SyncBatchNorm) and part.training and config.micro_batches % self.world_size:
                raise UsageError(
                    f"parallelize: {name or 'the model'} is a SyncBatchNorm, and {config.micro_batches} micro-batches "
                    f"can't be shared out evenly over {self.world_size} ranks: it would wait for passes that some of "
                    "them don't make; change global_batch or the number of ranks"
                )
        blocks = blocks_of(model, classes)
        if not blocks and config.activation_checkpointing != "none":
            raise UsageError(
                f"activation_checkpointing={config.activation_checkpointing!r}: no module of this "
                f"{type(model).__qualname__} is repeated in a list; name its blocks by parallelize(model, blocks=...)"
            )
        filler = Filler(model, config.seed, self._device)
        if tensor_parallel is not None:
            assert self.mesh is not None
            filler.fill(model)
            same_on_all_ranks(model.parameters())
            model = tensor_parallel(model.to(self._device), self.mesh["tensor"])
            filler = Filler(model, config.seed, self._device)  # what is filled stays as it is
        if config.activation_checkpointing != "none":
            recompute(blocks, config.activation_checkpointing)
        if config.compile:
            for part in blocks.values() or [model]:
                part.compile()
        if self.mesh is not None and any(p.requires_grad for p in model.parameters()):
            wrapped = self._sharded(model, list(blocks.values()), filler)
        else:
            wrapped = self._replicated(model, filler)
        self.models.append(wrapped)
        uneven = config.micro_batches % self.world_size
        if uneven and sum(isinstance(each, Sharded) for each in self.models) > 1:
            # A spare pass goes through one model; the collectives of another would be left out.
            raise UsageError(
                f"{config.micro_batches} micro-batches on {self.world_size} ranks: with more than one sharded model "
                "each rank needs as many; change global_batch or the number of ranks, or take parallel='ddp'"
            )
        return wrapped.module

    @property
    def replicated(self) -> bool:
        """Whether several ranks hold the same parameters."""
        if self.mesh is not None:
            return "replicate" in (self.mesh.mesh_dim_names or ())
        return self.world_size > 1

    def shares(self) -> list[int]:
        """How many micro-batches of a step each process has."""
        config, processes = self._config, range(dist.get_world_size())
        ranks = (process // config.tensor_parallel for process in processes)
        return [len(block(config.micro_batches, rank, self.world_size)) for rank in ranks]

    def check(self, optimizer: Optimizer) -> None:
        """:raises UsageError: it trains what the ranks would train each for itself."""
        if self.world_size == 1 or id(optimizer) in self._checked:
            return
        known = {id(parameter) for model in self.models for parameter in model.trained}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in known:
                    raise UsageError(
                        f"the optimizer's group {number} has a parameter of shape {tuple(parameter.shape)} of no model "
                        "that was given to run.parallelize, or one that was added or unfrozen since: its gradients "
                        "would stay on each rank; parallelize its module too, when all that is trained is there, or "
                        "freeze it"
                    )
        self._checked.add(id(optimizer))

    def _replicated(self, model: nn.Module, filler: Filler) -> Wrapped:
        filler.fill(model)
        model = model.to(self._device)
        _unexpand(model)
        trained = any(p.requires_grad for p in model.parameters())
        same_on_all_ranks([*model.buffers(), *(() if trained else model.parameters())])  # the rest DDP sees to
        if dist.get_world_size() == 1 or not trained:
            return Wrapped(model, exact=self.exact and trained)
        return Replicated(model, self._exchange, exact=self.exact)

    def _sharded(self, model: nn.Module, blocks: Sequence[nn.Module], filler: Filler) -> Wrapped:
        assert self.mesh is not None
        mesh, names = self.mesh, self.mesh.mesh_dim_names or ()
        if "tensor" in names:
            mesh = mesh[tuple(name for name in names if name != "tensor")]
        offload = CPUOffloadPolicy(pin_memory=True) if self._config.cpu_offload else OffloadPolicy()
        if self._device.type == "cpu":
            offload = OffloadPolicy()  # that is where everything is
        if not isinstance(model, FSDPModule):  # the user's own function may have done it
            _check_not_shared(model, blocks)
            # One after the other: only one block at a time is there as a whole, if the model was made on meta.
            alike = "tensor" in names  # made so before they were split
            for part in blocks:
                filler.fill(part)
                same_on_all_ranks(() if alike else part.parameters())
                fully_shard(part, mesh=mesh, mp_policy=self._precision.policy(), offload_policy=offload)
            versions = [parameter._version for part in blocks for parameter in part.parameters()]
            filler.fill(model, without=blocks)
            if versions != [parameter._version for part in blocks for parameter in part.parameters()]:
                raise UsageError(
                    f"reset_parameters of a module around the blocks of this {type(model).__qualname__} changes the "
                    "blocks, which are sharded by then; let a block fill its own parameters"
                )
            inner = {id(parameter) for part in blocks for parameter in part.parameters()}
            same_on_all_ranks(() if alike else (p for p in model.parameters() if id(p) not in inner))
            fully_shard(model, mesh=mesh, mp_policy=self._precision.policy(), offload_policy=offload)
        _unexpand(model)
        same_on_all_ranks(model.buffers())
        group = dist.group.WORLD if mesh is self.mesh else mesh._flatten().get_group()
        assert group is not None
        return Sharded(model, group, self._shards, exact=self.exact)


def _unexpand(model: nn.Module) -> None:
    """Give buffers memory for each of their elements: nothing can be written to what `expand` has made."""
    whole: dict[torch.Tensor, torch.Tensor] = {}
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is None or buffer.layout != torch.strided or buffer.is_nested or 0 not in buffer.stride():
                continue
            if dist.get_world_size() == 1 and name in part._non_persistent_buffers_set:
                continue  # never written to here, and it may be there many times over
            if buffer not in whole:  # what several modules share stays shared
                whole[buffer] = buffer.clone(memory_format=torch.contiguous_format)
            part._buffers[name] = whole[buffer]


def _check_not_shared(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    remedy = "name blocks that hold both by parallelize(model, blocks=...), or take parallel='ddp'"
    seen: dict[int, int] = {}
    for number, part in enumerate(blocks):
        for name, parameter in part.named_parameters():
            if seen.setdefault(id(parameter), number) != number:
                raise UsageError(
                    f"blocks {seen[id(parameter)]} and {number} share a parameter ({name}): they can't be sharded "
                    f"apart; {remedy}"
                )
    for part in modules_around(model, set(blocks)):
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in seen:
                raise UsageError(
                    f"block {seen[id(parameter)]} shares a parameter ({name} of a {type(part).__qualname__}) with what "
                    f"is around the blocks: they can't be sharded apart; {remedy}"
                )


class Buffers:
    """Those of some modules, looked up each time anew, since code may put another tensor in a buffer's place.

    :param modules: as they are now: a module that is added to them later isn't seen.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        # To go through the tree of modules takes longer than all the rest.
        self._parts = list(dict.fromkeys(part for module in modules for part in module.modules()))

    def all(self) -> list[torch.Tensor]:
        return [buffer for part in self._parts for buffer in part._buffers.values() if buffer is not None]

    def versions(self) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
        """They themselves, to be held, and what is the same later on if none of them was changed or replaced."""
        found = self.all()
        return found, [(id(buffer), buffer._version) for buffer in found]


def same_on_all_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank rank 0's values. All ranks must reach this, with tensors of the same sizes.

    DDP does so with the parameters of the models that it wraps as it begins, and with their buffers (running means and
    the like) before a step's first forward pass. Done after each step, the buffers of all models are equal in a
    checkpoint as well, and whether one is saved makes no difference to the training.
    """
    if dist.get_world_size() == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in by_kind.values():
        for together in _batches(same):
            flat = torch.cat([tensor.reshape(-1) for tensor in together])
            dist.broadcast(flat.view(torch.uint8), src=0)  # there is no backend for some of the types
            for tensor, part in zip(together, flat.split([tensor.numel() for tensor in together]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _batches(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """So many at a time that what they take once more doesn't matter."""
    batch: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if batch and size + tensor.nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor.nbytes
    if batch:
        yield batch
