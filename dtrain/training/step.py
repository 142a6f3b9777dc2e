"""`Step`: one optimizer step, made of a fixed list of micro-batches.

Each rank computes a contiguous block of the list. Losses and gradients are sums over everything that was counted, and
are divided once, at the end, by the count of all ranks: how the batch was cut leaves no trace in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dtrain.elastic.page import Page, Phase
from dtrain.errors import UsageError
from dtrain.training.data import Data
from dtrain.training.exchange import Exchange, Totals
from dtrain.training.given import check_loss, check_update
from dtrain.training.norm import divided, exact_norm, local_parts, total_norm
from dtrain.training.order import block
from dtrain.training.parallel import Parallel
from dtrain.training.precision import Precision
from dtrain.training.random import set_generators
from dtrain.training.wrapped import ORDERS, Turn

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from dtrain.training.guards import Watch

_CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""

Flags = tuple[bool, bool, int]
"""Whether to stop after this step, or to end the process, and what else to do after it."""


class Step:
    """One pass of the training loop. `run.steps` makes them.

    :ivar number: which step it is, the first being 1.
    :ivar values: what was logged, for the run's metrics.
    :ivar begun: whether a micro-batch was taken.
    :ivar divided: the optimizers of whose gradients `update` has made means, by their ids.
    :ivar updated: whether it is done with this step.
    :ivar skipped: whether a guard has kept it from the optimizer.
    """

    def __init__(
        self,
        number: int,
        *,
        seed: int,
        micro_batches: int,
        parallel: Parallel,
        precision: Precision,
        exchange: Exchange,
        scaler: GradScaler | None,
        ask: Callable[[], Flags],
        before_update: Callable[[], None],
        check: Callable[..., None],
        watch: Watch,
        page: Page,
    ) -> None:
        self.number = number
        self.values: dict[str, float] = {}
        self._seed = seed
        self._list = micro_batches
        self._parallel = parallel
        self._block = block(micro_batches, parallel.rank, parallel.world_size)
        self._precision = precision
        self._exchange = exchange
        self._scaler = scaler
        self._ask = ask
        self._before_update = before_update
        self._check = check
        self._watch = watch
        self._page = page
        page.mark(Phase.DATA)
        page.at, page.micro_batch, page.left = number, -1, len(self._block)
        self._open = False
        self._backwards = 0
        self.begun = False
        self.divided: set[int] = set()
        self.updated = False
        self.skipped = False
        self._own: list[tuple[int, torch.Tensor]] = []
        self._index = 0
        self._losses: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None  # a parameter that has a gradient since this step's first backward pass
        self._reached: set[int] = set()
        """On a single rank: the parameters that have a gradient since its last backward pass."""
        self._work: dist.Work | None = None
        self._count = 0
        self._totals: Totals | None = None
        self._norm: torch.Tensor | None = None
        exchange.begin(number)
        watch.begin()
        set_generators(seed, number, "step")

    def micro_batches(self, data: Data) -> Iterator[Any]:
        """The batches of this rank's block. Random numbers in the loop's body follow from the micro-batch alone.

        :param data: from `run.data`.
        """
        if not callable(getattr(data, "batches", None)):
            raise UsageError(
                f"step {self.number}: micro_batches takes what run.data(...) gives, and not a {type(data).__qualname__}"
            )
        if self._backwards:
            raise UsageError(f"step {self.number}: micro_batches was gone through before; do so once a step")
        page = self._page
        page.micro_batch = self._block[0]
        page.mark(Phase.DATA)
        for index, batch in zip(self._block, data.batches(self.number, self._block), strict=True):
            page.mark(Phase.FORWARD)
            set_generators(self._seed, self.number, index)
            turn = self._turn(index)
            for model in self._parallel.models:
                model.begin(turn)
            self._open = self.begun = True
            self._index = index
            with self._precision.autocast():
                yield batch
            if self._open:
                raise UsageError(
                    f"step {self.number}: micro-batch {index} got no step.backward(loss, count=...); every "
                    "one needs it, or the other ranks would wait for this one"
                )
            page.micro_batch = index + 1
            page.mark(Phase.DATA)
        page.micro_batch = -1
        page.mark(Phase.UPDATE)
        set_generators(self._seed, self.number, "update")

    def _turn(self, index: int) -> Turn:
        mine = self._block
        longest = -(-self._list // self._parallel.world_size)
        uneven = self._list % self._parallel.world_size > 0
        return Turn(index, self._list, index == mine[0], index == mine[-1], longest - len(mine), uneven)

    def backward(self, loss: torch.Tensor, *, count: int) -> None:
        """Add the gradients of one micro-batch.

        :param loss: a scalar, the SUM over all that is counted (`reduction="sum"`).
        :param count: over how many terms the loss is a sum: samples, tokens, ...
        :raises UsageError: it isn't called once in each pass of `micro_batches`, or with something else.
        """
        if not self._open:
            raise UsageError(f"step {self.number}: call backward once in each pass of step.micro_batches")
        check_loss(self.number, loss, count)
        if self._kept is not None and self._kept.grad is None:
            raise UsageError(
                f"step {self.number}: the gradients of the micro-batches before {self._index} are gone, before "
                "step.update has used them; leave out optimizer.zero_grad(), which it calls after each step"
            )
        self._open = False
        self._backwards += 1
        self._page.mark(Phase.BACKWARD)
        self._count += count
        self._own.append((self._index, loss.detach()))
        exact, counts = self._parallel.exact, self._parallel.counts
        if self._losses is None:  # a place for each micro-batch, where the order of the sum is not to matter
            self._losses = torch.zeros(self._list if exact else 1, dtype=torch.float64, device=loss.device)
        if counts:
            self._losses[self._index if exact else 0] += loss.detach().reshape(()).double()
        last = self._backwards == len(self._block)
        alone = exact or not loss.is_cpu
        if last:
            stop, end, action = self._ask()
            sent = 0.0 if alone else float(self._losses)
            order = sum(model.order for model in self._parallel.models) % ORDERS
            self._exchange.send(self._count if counts else 0, sent, stop=stop, end=end, action=action, order=order)
        with self._precision.off():
            (self._scaler.scale(loss) if self._scaler else loss).backward()
        if last:
            self._check_all_used()
        for model in self._parallel.models:
            model.end()
        if self._kept is None and not last:
            held = (model.holding() for model in self._parallel.models)
            self._kept = next((parameter for parameter in held if parameter is not None), None)
        if last:
            if dist.get_world_size() == 1:  # on several, all that are trained have one
                trained = (parameter for model in self._parallel.models for parameter in model.trained)
                self._reached = {id(parameter) for parameter in trained if parameter.grad is not None}
            self._exchange.depart()
            if alone:  # stays on the device: to look at it would wait for everything that is queued there
                self._work = dist.all_reduce(self._losses, async_op=True)
        self._page.left = len(self._block) - self._backwards
        self._page.mark(Phase.BETWEEN)

    def _check_all_used(self) -> None:
        for model in self._parallel.models:
            try:
                model.check()
            except RuntimeError as error:
                raise UsageError(
                    f"step {self.number}: the last backward pass left some of the model's parameters without a "
                    "gradient, and the ranks can't add them up; use all of them in every loss (add 0 * p.sum()), or "
                    "freeze them with requires_grad_(False)"
                ) from error

    def update(self, optimizer: Optimizer, *schedulers: LRScheduler, clip: float | None = None) -> None:
        """Divide the gradients by the count, clip them, and let the optimizer and its schedulers take a step.

        :param clip: the largest norm that the gradient of all of the optimizer's parameters may have.
        :raises UsageError: not all micro-batches had their backward pass, or nothing was counted; clip is no number
            above 0.
        """
        self._page.mark(Phase.UPDATE)
        check_update(self.number, optimizer, schedulers, clip)
        if self._backwards != len(self._block):
            raise UsageError(
                f"step {self.number}: {self._backwards} of {len(self._block)} micro-batches had a backward pass "
                "before update; go through step.micro_batches to its end"
            )
        if self.totals.count == 0:
            raise UsageError(f"step {self.number}: the counts of all micro-batches add up to 0")
        self._parallel.check(optimizer)
        self._check(optimizer, *schedulers)
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        # On a single rank models may take turns, and an optimizer have nothing to do.
        missed = dist.get_world_size() > 1 or not self._reached or any(id(p) in self._reached for p in trained)
        if trained and not gradients and missed:
            raise UsageError(
                f"step {self.number}: no parameter of this {type(optimizer).__qualname__} has a gradient: it was "
                "updated in this step before, or optimizer.zero_grad() was called, or no loss depends on what it "
                "trains; call update once a step for each optimizer, and leave zero_grad() to it"
            )
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
            if self._parallel.world_size < dist.get_world_size():
                # By tensor parallelism: torch asks those only that share the first parameter.
                for found in self._scaler._found_inf_per_device(optimizer).values():
                    dist.all_reduce(found, op=dist.ReduceOp.MAX)
        finite = self._divide(gradients, clip)
        self.divided.add(id(optimizer))
        if self.skipped or (self._watch.looks and not self._watch.allows(self, finite=finite)):
            self.skipped = True  # for another optimizer of the same step as well
        else:
            self._before_update()
            if self._take(optimizer, gradients):
                for scheduler in schedulers:
                    scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        self.updated = True
        self._page.mark(Phase.BODY)

    def _take(self, optimizer: Optimizer, gradients: list[torch.Tensor]) -> bool:
        """Let the optimizer take the step. :returns: whether it did: a GradScaler leaves out what has overflowed."""
        if not gradients:  # an average of the weights counts an optimizer's steps, and isn't to count this one
            return True
        if self._scaler is None:
            optimizer.step()
            return True
        self._scaler.step(optimizer)  # a fused optimizer is called in any case, and finds out by itself
        return not any(map(bool, self._scaler._found_inf_per_device(optimizer).values()))

    def _divide(self, gradients: list[torch.Tensor], clip: float | None) -> bool:
        """Make the sums a mean, and clip it. :returns: whether all of it is finite, on all ranks."""
        if not gradients:
            return True
        looks = self._watch.looks and self._scaler is None  # which leaves out what has overflowed by itself
        factor: float | torch.Tensor = 1.0 / self.totals.count
        if clip is not None:
            norm = (exact_norm if self._parallel.exact else total_norm)(gradients) * factor
            self._norm = norm
            factor = factor * torch.clamp(clip / (norm + _CLIP_EPSILON), max=1.0)
        parts = local_parts(gradients)
        if not parts:
            return True
        if clip is not None or not looks:
            torch._foreach_mul_(parts, factor)  # one pass over them, for the mean and the clipping
            return not looks or bool(torch.isfinite(norm))
        spread = any(isinstance(gradient, DTensor) for gradient in gradients)
        return divided(parts, 1.0 / self.totals.count, spread=spread)

    def bad_losses(self) -> list[int]:
        """This rank's micro-batches whose loss isn't finite."""
        return [index for index, loss in self._own if not torch.isfinite(loss).all()]

    def bad_gradient(self) -> bool:
        """Whether this rank's own gradient isn't finite, as far as that can be told."""
        return self._exchange.bad

    def log(self, **values: float) -> None:
        """Keep numbers with this step's loss, in the run's `metrics.jsonl`.

        :raises UsageError: one of them is none.
        """
        for name, value in values.items():
            try:
                self.values[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UsageError(f"step {self.number}: log({name}={value!r}) must be a number") from error

    @property
    def totals(self) -> Totals:
        """The sums over all ranks, once all backward passes are under way.

        :raises UsageError: they aren't yet; or ranks went through a sharded model in ways that don't go together.
        """
        if self._totals is None:
            if self._backwards != len(self._block):
                raise UsageError(f"step {self.number}: known only after the last step.backward")
            totals = self._exchange.totals()
            odd = [rank for rank, order in enumerate(totals.orders) if order != totals.orders[0]]
            if odd:
                raise UsageError(
                    f"step {self.number}: the forward passes of rank{'s' if len(odd) > 1 else ''} "
                    f"{', '.join(map(str, odd))} took other blocks of the model than those of rank 0, or in another "
                    "order, and under FSDP the ranks exchange one block after the other; have every micro-batch go "
                    "through the same blocks, or take parallel='ddp'"
                )
            self._totals = totals
        return self._totals

    @property
    def loss(self) -> float:
        """The mean loss over all that was counted on all ranks, once all backward passes are under way."""
        totals = self.totals
        assert self._losses is not None
        alone = self._parallel.exact or not self._losses.is_cpu
        if self._work is not None:
            self._work.wait()
            self._work = None
        total = float(self._losses.sum()) if alone else totals.loss
        return total / max(1, totals.count)

    @property
    def gradient_norm(self) -> float:
        """Of the mean gradient of all of the optimizer's parameters, before it was clipped.

        :raises UsageError: `update` wasn't called yet, or without `clip`.
        """
        if self._norm is None:
            raise UsageError(f"step {self.number}: gradient_norm is known after step.update(optimizer, clip=...)")
        return float(self._norm)

    def finish(self) -> None:
        """:raises UsageError: the loop's body has left something out."""
        if not self.updated:
            raise UsageError(f"step {self.number} ended without step.update(optimizer)")
        if self._scaler is not None:
            # What a guard has left out says nothing about the scale.
            self._scaler.update(self._scaler.get_scale() if self.skipped else None)
