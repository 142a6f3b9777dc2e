"""A model of which every rank keeps a part: FSDP2, and HSDP, where several groups of ranks keep one copy each.

Every forward and backward pass gathers parameters, so all ranks must make the same number of passes. Where the list of
micro-batches can't be shared out evenly, a rank that has one less makes a spare pass: over the input of its first
micro-batch, with a gradient of zero, unseen by the loop.

With `reduction="exact"` FSDP2 hands over each micro-batch's gradients in place of reducing them. They are kept, and
exchanged with those of the last.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dtrain.errors import UsageError
from dtrain.training.random import generators_kept
from dtrain.training.reduce import Pending, Sums
from dtrain.training.wrapped import ORDERS, UNUSED, Turn, Wrapped


class Sharded(Wrapped):
    """A model that `fully_shard` was applied to.

    :param group: the ranks that each have micro-batches of their own.
    :param shards: how many of them share a copy.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, shards: int, *, exact: bool) -> None:
        super().__init__(model, exact=exact)
        self.group = group
        self.shards = shards
        self._spare = 0
        self._open = False
        """Whether a backward pass is to follow: from a micro-batch's begin to its end."""
        self._uneven = False
        self._forwards = 0
        self.is_spare = False
        self._dropping: list[RemovableHandle] = []
        self._reductions: list[_Reduce] = []
        self._root = next(part for part in model.modules() if isinstance(part, FSDPModule))
        self._units: dict[str, nn.Module] = {}
        """By name: what is reduced when the backward pass comes to it. The root's turn is at the end in any case."""
        self._reached: set[str] = set()
        part: nn.Module
        for number, (name, part) in enumerate(model.named_modules(), 1):
            if isinstance(part, FSDPModule):
                part.register_forward_pre_hook(torch.compiler.disable(partial(self._enter, number)))
                part.set_gradient_divide_factor(1.0)  # sums, which are divided once, by what was counted
                part.set_force_sum_reduction_for_comms(True)
                if not exact and hasattr(part, "set_reduce_scatter_unused_params"):
                    # Or a rank would leave out what its own losses don't use, and send what others take for the rest.
                    part.set_reduce_scatter_unused_params(True, recurse=False)
                own = _own_parameters(part)
                if exact and own:
                    together = dist.get_world_size(group) < dist.get_world_size()  # by tensor parallelism
                    reduce = _Reduce(self, None if together else sum(_padded(p, shards) for p in own))
                    self._reductions.append(reduce)
                    part.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]
                    if shards == 1:  # FSDP2 then has nothing to scatter
                        part.set_all_reduce_hook(reduce.alone)
                elif own and part is not self._root:
                    self._units[name] = part
                    part.register_forward_hook(torch.compiler.disable(partial(self._watch, name)))
        model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        model.register_forward_hook(self._after_forward)

    @property
    def turn(self) -> Turn:
        return self._turn

    def begin(self, turn: Turn) -> None:
        self._turn = turn
        self._open = True
        self._reached.clear()
        if turn.first:
            self._check_trained()
            self.order = 0
            self._drop()
        self._expect(turn.spare if turn.first else self._spare, uneven=turn.uneven)
        for reduce in self._reductions:
            reduce.called = False
        self._root.set_requires_gradient_sync(turn.last or self.exact)

    def look(self, spare: int, *, uneven: bool) -> None:
        self._expect(spare, uneven=uneven)

    def _expect(self, spare: int, *, uneven: bool) -> None:
        self._spare, self._uneven, self._forwards = spare, uneven, 0

    def check(self) -> None:
        if not self._turn.last or self.exact:
            return
        # FSDP2 reduces these at the very end, while other ranks do when they come to them: not the same one at a time.
        missed = [name for name in self._units if name not in self._reached]
        if missed:
            raise UsageError(
                f"micro-batch {self._turn.index}: the backward pass didn't come to {', '.join(missed)}, and under FSDP "
                "the ranks add up the gradients of one block after the other; have each rank's last loss of a step "
                "depend on the output of every block (add 0 * output.sum()), or take parallel='ddp'"
            )
        if any(p.grad is None for p in self._trained()):
            raise RuntimeError("FSDP was not reached by the backward pass")

    def end(self) -> None:
        self._open = False
        if self._turn.last:
            self._uneven = False
        if not all(reduce.called for reduce in self._reductions):
            raise UsageError(f"micro-batch {self._turn.index}: {UNUSED}")
        if self.exact and not self._turn.last:
            self._drop()

    def holding(self) -> None:
        """FSDP2 keeps gradients where they aren't seen until it sums them up."""

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_spare:
            return
        self._forwards += 1
        if self._uneven and self._forwards > 1:
            raise UsageError(
                "the model was called twice for one micro-batch, and the ranks have different numbers of them: under "
                "FSDP they could not keep step; change global_batch or the number of ranks, or take parallel='ddp'"
            )
        if self._spare:
            passes, self._spare = self._spare, 0
            for _ in range(passes):
                self._spare_pass(args, kwargs)

    def _after_forward(self, *_: object) -> None:
        # FSDP2 keeps the root's own parameters gathered for a backward pass. Where none follows, the next forward pass
        # would take them as they were, whatever has become of this rank's part since.
        if not self._open or not torch.is_grad_enabled():
            self._root.reshard()

    def _enter(self, number: int, part: nn.Module, *_: object) -> None:
        self.order = (self.order * 1_000_003 + number) % ORDERS
        if self.is_spare and self._open and not self.exact:
            for parameter in _own_parameters(part):  # as they were gathered: what FSDP2 takes gradients from
                self._dropping.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))

    def _watch(self, name: str, module: nn.Module, args: object, out: Any) -> None:
        if self._turn.last and not self.is_spare and torch.is_grad_enabled():
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: self._reached.add(name))

    def _spare_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._root.set_requires_gradient_sync(self.exact)
        self.is_spare = True
        buffers = [
            (part, name, buffer, buffer.clone())
            for part in self.module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        # A model may write into its input.
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda given: given.detach().clone(), (args, kwargs))
        with generators_kept():
            out = self.module(*args, **kwargs)
            leaves = pytree.tree_leaves(out)
            reached = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            if not self._open:
                pass  # measured outside of a step's micro-batches: the other ranks make no backward pass either
            elif reached:
                torch.autograd.backward(reached, [torch.zeros_like(leaf) for leaf in reached])
            elif torch.is_grad_enabled():
                raise UsageError(
                    f"the model returns a {type(out).__qualname__}, in which no tensor with a gradient is found, and "
                    "the ranks have different numbers of micro-batches: under FSDP one with less needs to go through "
                    "the model once more; return a tensor, a tuple or a dict, or change global_batch or the number of "
                    "ranks"
                )
        for part, name, buffer, before in buffers:
            part._buffers[name] = buffer  # another may have been put in its place
            # Guards tell by the version whether a step has changed a buffer, and this pass is no part of it.
            with torch.autograd._unsafe_preserve_version_counter(buffer):
                buffer.copy_(before)
        self.is_spare = False
        while self._dropping:
            self._dropping.pop().remove()
        if self.exact:
            self._drop()
        self._root.set_requires_gradient_sync(self._turn.last or self.exact)


class _Reduce:
    """What FSDP2 calls to reduce the gradients of one of its groups of parameters, in place of its own way."""

    def __init__(self, model: Sharded, numel: int | None) -> None:
        """:param numel: of all of the group's gradients, as they come; None if that isn't known."""
        self._model = model
        self._numel = numel
        self._sums = Sums(1)
        self.called = False

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: object, **options: object
    ) -> None:
        """Keep a micro-batch's gradients; with the last one, fill the output with this rank's shard of the sum.

        All ranks must reach it. The output is worth nothing before.
        """
        model = self._model
        if not self._take(input_tensor):
            output_tensor.zero_()
            return
        nodes = [node.parts[0] for node in self._sums.nodes]
        segment = Pending(nodes, model.turn.length, model.shards, model.group).segment()
        if segment.numel() == output_tensor.numel():
            output_tensor.copy_(segment)
            return
        # Others have the rest of this shard, and FSDP2 adds it up next: -0.0 changes nothing that it is added to.
        output_tensor.fill_(-0.0)
        begin = dist.get_rank(model.group) // model.shards * segment.numel()
        mine = output_tensor[begin : begin + segment.numel()]
        mine.copy_(segment[: mine.numel()])

    def alone(self, gradients: torch.Tensor) -> None:
        """The same on a single rank, in place."""
        if self._take(gradients.clone()):
            gradients.copy_(self._sums.total()[0])

    def _take(self, gradients: torch.Tensor) -> bool:
        """:returns: whether these were the last."""
        model = self._model
        if model.is_spare:
            return False
        turn = model.turn
        if turn.first:
            self._sums = Sums(turn.length)
        if self._numel is not None and gradients.numel() != self._numel:
            raise UsageError(f"micro-batch {turn.index}: {UNUSED}")
        if self.called:
            raise UsageError(
                "reduction='exact' with FSDP: the backward pass has come to a block twice in one micro-batch; call "
                "step.backward on one loss that has all of them, or take parallel='ddp'"
            )
        self.called = True
        if gradients.is_cuda:  # kept until they are added up, on the stream that this is called on
            gradients.record_stream(torch.cuda.current_stream())
        self._sums.add(turn.index, turn.index + 1, [gradients])
        return turn.last


def _drop_gradient(parameter: torch.Tensor) -> None:
    """Of a spare pass: zeros, but NaN where an output has no gradient at all and the loss doesn't use it."""
    parameter.grad = None


def _own_parameters(part: nn.Module) -> list[nn.Parameter]:
    """What is trained of a module that FSDP2 shards as a unit, without the units in it."""
    units = [module for module in part.modules() if module is not part and isinstance(module, FSDPModule)]
    inner = {id(parameter) for unit in units for parameter in unit.parameters()}
    return [parameter for parameter in part.parameters() if parameter.requires_grad and id(parameter) not in inner]


def _padded(parameter: nn.Parameter, shards: int) -> int:
    """Elements of its gradient, with what is added for all shards to be of one size."""
    first, *rest = parameter.shape or (1,)
    return -(-first // shards) * shards * math.prod(rest)
