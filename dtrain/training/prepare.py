"""What is done to a model before it is spread over the ranks: its blocks are found, filled, made to recompute what they
don't keep, and compiled. None of it changes the names in its state dict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dtrain.errors import UsageError
from dtrain.training.random import set_generators

Blocks = dict[str, nn.Module]
"""By their dotted names."""

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""With selective checkpointing: what takes long to compute. All else is cheap, and is computed again."""


def blocks_of(model: nn.Module, classes: Sequence[type[nn.Module]] | type[nn.Module] | None) -> Blocks:
    """The blocks that a model is made of, none within another.

    :param classes: theirs; None finds the one class that is repeated in lists and holds the most parameters.
    :raises UsageError: there are none of these classes.
    """
    if isinstance(classes, type):
        classes = (classes,)
    if classes is None:
        classes = _repeated(model)
    elif not any(isinstance(module, tuple(classes)) for module in model.modules()):
        names = ", ".join(kind.__name__ for kind in classes)
        raise UsageError(f"parallelize(blocks=({names})): a {type(model).__qualname__} has no module of these classes")
    kinds: tuple[type[nn.Module], ...] = tuple(classes)
    found: Blocks = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and isinstance(module, kinds):
            found[name] = module
    return found


def _repeated(model: nn.Module) -> tuple[type[nn.Module], ...]:
    sizes: dict[type[nn.Module], int] = {}
    waiting: deque[nn.Module] = deque([model])
    while waiting:  # breadth first: of two that hold as much, the outer one is meant
        module = waiting.popleft()
        children = list(module.children())
        waiting.extend(children)
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            kinds = [type(child) for child in children]
            for child in children:
                if kinds.count(type(child)) > 1:
                    size = sum(parameter.numel() for parameter in child.parameters())
                    sizes[type(child)] = sizes.get(type(child), 0) + size
    best = max(sizes, key=lambda kind: sizes[kind], default=None)
    return (best,) if best is not None and sizes[best] else ()


class Filler:
    """Gives modules that were made on the meta device their memory and their first values.

    The values are those of each module's `reset_parameters`, called with random numbers that follow from the seed and
    the module's name: they are the same on any number of ranks, however the model is then spread over them.

    :param model: all of it, for the names and for parameters that several modules share.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._seed = seed
        self._device = device
        self._made: dict[torch.Tensor, torch.Tensor] = {}
        self._versions: dict[torch.Tensor, int] = {}
        """Of what was made."""
        self._empty: set[nn.Module] = set()

    def fill(self, root: nn.Module, without: Iterable[nn.Module] = ()) -> None:
        """Fill a module and what is in it.

        :param without: modules in it that were filled before.
        :raises UsageError: some parameters belong to a module that doesn't know how to fill them.
        """
        modules = modules_around(root, set(without))
        made = [(module, place, key) for module in modules for place, key in self._allocate(module)]
        able = [module for module in modules if callable(getattr(module, "reset_parameters", None))]
        for module in reversed(able):  # what is inside comes first: an outer one may change it
            if self._empty & set(module.modules()):
                set_generators(self._seed, "fill", self._names[module])
                module.reset_parameters()  # type: ignore[operator]
        for module, place, key in made:
            value = place.get(key)  # a reset may have put another tensor there
            if value is not None and self._is_unfilled(value):
                name = f"{self._names[module]}.{key}".lstrip(".")
                raise UsageError(
                    f"{name} was made on the meta device, and no reset_parameters has filled it: define it in its "
                    f"{type(module).__qualname__}, or make the model on a real device"
                )

    def _allocate(self, module: nn.Module) -> list[tuple[dict[str, Any], str]]:
        """Give a module's own tensors memory. :returns: where those are that had none."""
        made = []
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for place in places:
            for key, value in list(place.items()):
                if value is None or not value.is_meta:
                    continue
                self._empty.add(module)
                if value not in self._made:
                    memory = torch.full_like(value, _mark(value.dtype), device=self._device)
                    is_parameter = isinstance(value, nn.Parameter)
                    self._made[value] = nn.Parameter(memory, value.requires_grad) if is_parameter else memory
                    self._versions[self._made[value]] = self._made[value]._version
                place[key] = self._made[value]
                made.append((place, key))
        return made

    def _is_unfilled(self, value: torch.Tensor) -> bool:
        if value.numel() == 0:
            return False
        if value.is_meta:
            return True
        if value not in self._versions:  # a reset made it
            return False
        if not value.dtype.is_signed:
            # Nor by it alone: what goes through `.data` isn't counted.
            bits = value.reshape(-1).view(torch.uint8)
            return self._versions[value] == value._version and not bool(bits.any())
        mark = _mark(value.dtype)
        return bool((torch.isnan(value) if math.isnan(mark) else value == mark).any())


def _mark(dtype: torch.dtype) -> float:
    """What new memory is filled with, to see whether anybody writes to it.

    Types without a sign have no value to spare: of these it is seen by the version whether anybody has written.
    """
    if not dtype.is_signed:
        return 0
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min + 1


def modules_around(root: nn.Module, without: set[nn.Module]) -> list[nn.Module]:
    """A module and all in it, but for some with what is in them."""
    found = [root]
    for child in root.children():
        if child not in without:
            found += modules_around(child, without)
    return list(dict.fromkeys(found))


def recompute(blocks: Blocks, how: str | int) -> None:
    """Activation checkpointing: have blocks keep their input only, and compute the rest again in the backward pass.

    :param how: `"full"`; `"selective"`, where products of matrices, convolutions and attention are kept; or a number k,
        for every k-th block.
    """
    context = partial(create_selective_checkpoint_contexts, _policy)
    options: dict[str, Any] = {"context_fn": context} if how == "selective" else {}
    every = how if isinstance(how, int) else 1
    # One for all blocks of a kind: torch.compile compiles for so many classes only.
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for number, block in enumerate(blocks.values(), 1):
        if number % every == 0:
            # A class of its own, as FSDP2 gives it too: a wrapper would change names, and a method that is put on
            # the block itself would be that of the original in a copy.
            kind = type(block)
            if kind not in made:
                made[kind] = type(kind.__name__, (kind,), {"forward": _forward(kind, options)})
            block.__class__ = made[kind]


def _forward(kind: type[nn.Module], options: dict[str, Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **options, **kwargs)

    return forward


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
