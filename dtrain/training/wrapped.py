"""A model as a step sees it. `ddp.py` and `fsdp.py` have those that are spread over several ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dtrain.errors import UsageError
from dtrain.training.reduce import Sums

UNUSED = (
    "some of the model's parameters got no gradient, and reduction='exact' needs one of each in every micro-batch; use "
    "all of them in every loss (add 0 * p.sum()), or freeze them with requires_grad_(False)"
)


ORDERS = 16_777_213
"""A model's order is less than this, which a float32 holds."""


@dataclass(frozen=True)
class Turn:
    """One micro-batch's turn on a rank."""

    index: int
    """The micro-batch's number in the step's list."""
    length: int
    """Of that list."""
    first: bool
    """Of this rank's turns in the step."""
    last: bool
    """Likewise: with it the gradients are summed over the ranks."""
    spare: int = 0
    """How many turns more other ranks have."""
    uneven: bool = False
    """Whether any rank has more turns than another."""


class Wrapped:
    """A model that is on one rank, or whose gradients need no sum.

    :param exact: whether gradients are added in the order of `reduce`.
    :ivar module: what the user calls.
    :ivar trained: the parameters that required a gradient when it was made.
    :ivar order: tells the order in which the forward passes of a step came to what all ranks must come to together from
        any other; 0 if there is nothing of that kind.
    """

    def __init__(self, module: nn.Module, *, exact: bool = False) -> None:
        self.module = module
        self.exact = exact
        self.order = 0
        self._parameters = list(module.parameters())
        self.trained = self._trained()
        self._turn = Turn(0, 1, first=True, last=True)
        self._sums = Sums(1)

    def begin(self, turn: Turn) -> None:
        """Before a micro-batch's forward pass."""
        self._turn = turn
        if turn.first:
            self._sums = Sums(turn.length)
            self._drop()  # what an optimizer has left, that takes no part in every step

    def end(self) -> None:
        """After its backward pass. After the last one, the gradients are sums over the whole list."""
        if not self.exact:
            return
        parameters = self._trained()
        self._keep(parameters)
        if self._turn.last:
            for parameter, gradient in zip(parameters, self._sums.total(), strict=True):
                parameter.grad = gradient

    def look(self, spare: int, *, uneven: bool) -> None:
        """Before a pass without gradients. See `Turn` for the parameters."""

    def check(self) -> None:
        """:raises RuntimeError: some parameters got no gradient, and the ranks can't add them up."""

    def holding(self) -> nn.Parameter | None:
        """A parameter that has a gradient between two micro-batches, if any has."""
        return None if self.exact else next((p for p in self._parameters if p.grad is not None), None)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def _check_trained(self) -> None:
        """:raises UsageError: other parameters require a gradient than when it was made."""
        now = self._trained()
        if list(map(id, now)) != list(map(id, self.trained)):
            raise UsageError(
                f"other parameters of the model require a gradient than when it came to parallelize ({len(now)} now, "
                f"{len(self.trained)} then): freeze or unfreeze them before"
            )

    def _keep(self, parameters: list[nn.Parameter]) -> None:
        """Take a micro-batch's gradients away from the parameters, for the next one's not to be added to them."""
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                raise UsageError(f"micro-batch {self._turn.index}: {UNUSED}")
            gradients.append(parameter.grad)
        self._drop()
        self._sums.add(self._turn.index, self._turn.index + 1, gradients)

    def _drop(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
