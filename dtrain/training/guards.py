"""`Watch`: looks at the loss and the gradient of every step, and keeps garbage from the optimizer.

All ranks come to the same verdict by themselves, from numbers that are the same on all of them. Only when one of them
isn't finite do they ask each other whose it was.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtrain.checkpoint.manager import from_all_ranks
from dtrain.checkpoint.plan import local_part
from dtrain.criteria import Guards
from dtrain.elastic.failure import GoBack
from dtrain.errors import Garbage
from dtrain.observe.events import Events, say
from dtrain.training.parallel import Buffers, Parallel
from dtrain.training.sources import Sources

if TYPE_CHECKING:
    from dtrain.training.step import Step

_LEAST = 8
"""Losses from which on another one can be told to be far from them."""
_NORMAL = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations (P. J. Rousseeuw and C. Croux,
"Alternatives to the Median Absolute Deviation", JASA 88, 1993)."""
_FLAT = 1e-2
"""Of the median loss: a curve that is flatter than this isn't taken for flatter, or every ripple would be a spike."""


class Watch:
    """One rank's.

    :param skipped: steps that were passed over, or left out; it adds to them.
    :param compare: looks, at a step, whether the copies of the parameters still agree, and goes back if they don't: a
        bit that flips can make a gradient that isn't finite, and so is not the data's fault.
    :param forget: drops what is in memory, and waits for what is being saved.
    """

    def __init__(
        self,
        guards: Guards,
        parallel: Parallel,
        sources: Sources,
        events: Events,
        skipped: set[int],
        compare: Callable[[int], None],
        forget: Callable[[], None],
    ) -> None:
        self._guards = guards
        self._parallel = parallel
        self._buffers: Buffers | None = None
        self._parameters: list[tuple[str, torch.nn.Parameter]] | None = None
        self._sources = sources
        self._events = events
        self._skipped = skipped
        self._compare = compare
        self._forget = forget
        self._losses: deque[float] = deque(maxlen=guards.spike_window)

    @property
    def looks(self) -> bool:
        """Whether anything is looked at in a step."""
        return self._guards.nonfinite != "off" or self._guards.loss_spike != "off"

    def begin(self) -> None:
        """A step begins."""
        if self._buffers is None:
            self._buffers = Buffers(model.module for model in self._parallel.models)
        self._held, self._versions = self._buffers.versions()

    def allows(self, step: Step, *, finite: bool) -> bool:
        """Whether the optimizer may take a step. All ranks must reach it.

        :param finite: whether the gradient is, on all ranks.
        :raises GoBack: the run goes back, and passes over the step.
        :raises Garbage: it stops.
        """
        loss = step.loss
        if self._guards.nonfinite != "off" and not (finite and math.isfinite(loss)):
            if not step.updated:
                self._compare(step.number - 1)
            return self._refuse(step, self._nonfinite(step, loss), self._guards.nonfinite)
        score = self._score(loss)
        if score > self._guards.spike_score:
            what = f"the loss is {loss:g}, {score:.1f} deviations above the {len(self._losses)} before"
            if self._guards.loss_spike == "rollback":
                if not step.updated:
                    self._compare(step.number - 1)
                return self._refuse(step, what, "rollback")
            if dist.get_rank() == 0:
                self._events.emit("spike", step=step.number, loss=loss, score=score)
                say(f"step {step.number}: {what}")
        if math.isfinite(loss) and not step.updated:
            self._losses.append(loss)
        return True

    def _score(self, loss: float) -> float:
        """How far a loss is above those before it: in standard deviations, as told by their median deviation."""
        before = self._losses
        if self._guards.loss_spike == "off" or len(before) < _LEAST or not math.isfinite(loss):
            return 0.0
        middle = median(before)
        spread = max(_NORMAL * median(abs(value - middle) for value in before), _FLAT * abs(middle), 1e-12)
        return (loss - middle) / spread

    def _nonfinite(self, step: Step, loss: float) -> str:
        """What isn't finite, and whose it was. All ranks must reach it."""
        mine: dict[str, Any] = {
            "host": socket.gethostname(),
            "losses": step.bad_losses(),
            "gradient": step.bad_gradient(),
        }
        named = []
        for rank, theirs in enumerate(from_all_ranks(mine)):
            if theirs["losses"]:
                batches = ", ".join(map(str, theirs["losses"]))
                several = "es" if len(theirs["losses"]) > 1 else ""
                named.append(f"rank {rank} ({theirs['host']}): the loss of micro-batch{several} {batches}")
            elif theirs["gradient"]:
                named.append(f"rank {rank} ({theirs['host']}): its gradient")
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else "the gradient isn't finite"
        return f"{what}; it comes from {'; '.join(named)}" if named else what

    def _refuse(self, step: Step, reason: str, how: str) -> bool:
        """Leave a step out, in the way that was chosen. :returns: False."""
        number, guards = step.number, self._guards
        in_a_row = 0
        while number - 1 - in_a_row in self._skipped:
            in_a_row += 1
        samples = self._sources.ids(number)
        if how == "stop" or in_a_row >= guards.most_in_a_row:
            if dist.get_rank() == 0:
                self._events.emit("garbage", step=number, reason=reason, samples=samples)
            what = f"step {number}: {reason}"
            remedy = "or have such steps left out by Config(guards=dtrain.Guards(nonfinite='skip'))"
            dist.barrier()  # who raises first has the others killed, whatever they are at
            if how != "stop":
                what += f", after {in_a_row} steps in a row that were left out"
                remedy = f"or allow for more of them than Guards(most_in_a_row={guards.most_in_a_row})"
            raise Garbage(
                f"{what}. The optimizer hasn't seen it, and the checkpoints are from before; the ids of its samples "
                f"are in events.jsonl. Lower the learning rate, clip, look at these samples, {remedy}"
            )
        # Running means that have seen it, and an optimizer before this one, can't be taken back: then only a state from
        # before is without a trace of the step.
        # A rank that makes a spare pass writes its buffers back, and would find them changed when others don't.
        changed = any(from_all_ranks(self._buffers is not None and self._versions != self._buffers.versions()[1]))
        back = how == "rollback" or changed or step.updated
        if dist.get_rank() == 0:
            kind = "rolled_back" if back else "skipped"
            self._events.emit(kind, step=number, reason=reason, samples=samples)
            if not back:
                say(f"step {number} is skipped: {reason}; the ids of its samples are in events.jsonl")
        if not back:
            self._skipped.add(number)
            return False
        if how == "rollback":
            self._forget()
        dist.barrier()
        raise GoBack(f"step {number}: {reason}; back to a state before it, and the step will be skipped", over=number)

    def check_parameters(self, step: int) -> None:
        """Before a checkpoint. :raises Garbage: a parameter isn't finite, by an update that was too large."""
        if self._guards.nonfinite == "off":
            return
        if self._parameters is None:  # to go through the modules takes longer than the sums
            self._parameters = [named for model in self._parallel.models for named in model.module.named_parameters()]
        if not self._parameters:
            return
        parts = [local_part(parameter).detach() for _, parameter in self._parameters]
        sums = [(torch.view_as_real(part) if part.is_complex() else part).sum(dtype=torch.float32) for part in parts]
        finite = torch.isfinite(torch.stack(sums))
        if not finite.all():
            name = self._parameters[finite.int().argmin()][0]
            self._forget()  # the snapshots in memory may have it as well
            raise Garbage(
                f"step {step}: {name} isn't finite, and this state is not saved; the checkpoint before stands. "
                "The updates are too large: lower the learning rate"
            )

    def state(self) -> list[float]:
        """The losses that are looked back at, where something follows from them."""
        return list(self._losses) if self._guards.loss_spike == "rollback" else []

    def load(self, losses: list[float]) -> None:
        self._losses.clear()
        self._losses.extend(losses)
