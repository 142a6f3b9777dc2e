"""`Difference`: in what the tracked objects aren't those that were saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.checkpoint.format import Manifest
from dtrain.checkpoint.tree import dtype_name, flatten

Kind = Literal["missing", "unexpected", "reshaped", "retyped", "options", "other"]
PARAMETERS = ("params", "param_names")
"""What an optimizer's parameter group has besides options."""

_MOST_NAMED = 20
"""More differences than this are counted instead of listed."""


@dataclass(frozen=True, order=True)
class Difference:
    """Between what is tracked and what was saved."""

    name: str
    """Dotted, of a tensor, an object, or a parameter's optimizer state."""
    kind: Kind
    text: str
    of: str = ""
    """What it is said of, where that isn't the name."""

    def __str__(self) -> str:
        return f"{self.of or self.name}: {self.text}"


def listed(things: Iterable[object]) -> str:
    """As lines, so many of them as somebody would read; the rest is counted."""
    lines = [str(thing) for thing in things]
    more = [f"... and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
    return "\n  ".join(lines[:_MOST_NAMED] + more)


def is_extra(key: str) -> bool:
    """Whether it is of a module's `get_extra_state`, which may have any shape, and another one each time."""
    return "_extra_state" in key.split(".")


def module_differences(name: str, module: nn.Module, manifest: Manifest) -> Iterator[Difference]:
    saved = {
        key: (tuple(item.shape), item.dtype)
        for key, item in manifest.tensors.items()
        if key.startswith(f"{name}.") and not is_extra(key)
    }
    live = {
        f"{name}.{key}": (tuple(leaf.shape), dtype_name(leaf.dtype))
        for key, (_, leaf) in flatten(module.state_dict()).items()
        if isinstance(leaf, torch.Tensor) and not is_extra(key)
    }
    for key in sorted(saved.keys() | live.keys()):
        before, now = saved.get(key), live.get(key)
        if before is None:
            yield Difference(key, "missing", "not in the checkpoint")
        elif now is None:
            yield Difference(key, "unexpected", "in the checkpoint only")
        elif before[0] != now[0]:
            yield Difference(key, "reshaped", f"saved with shape {before[0]}, now {now[0]}")
        elif before[1] != now[1]:
            yield Difference(key, "retyped", f"saved as {before[1]}, now {now[1]}")
    tree = manifest.tree[name]
    saved_extra, live_extra = (
        {f"{name}.{key}" for key in (state if isinstance(state, dict) else ()) if is_extra(key)}
        for state in (tree, module.state_dict())
    )
    for key in sorted(saved_extra ^ live_extra):
        if key in live_extra:
            yield Difference(key, "missing", "not in the checkpoint")
        else:
            yield Difference(key, "unexpected", "in the checkpoint only")


def lacking(optimizer: Optimizer, saved: Mapping[str, Any], live: Mapping[str, Any]) -> set[str]:
    """The options that an optimizer would be without, once it is given a parameter group that was saved.

    What an older version of torch has saved may have fewer, which the newer one's optimizer fills in. What an optimizer
    of somebody else's fills in is known only when it is done.
    """
    kind = type(optimizer)
    hooks = optimizer._optimizer_load_state_dict_pre_hooks or optimizer._optimizer_load_state_dict_post_hooks
    own = kind.load_state_dict is not Optimizer.load_state_dict
    if hooks or own or not kind.__setstate__.__module__.startswith("torch.optim."):
        return set()
    twin: Optimizer = object.__new__(kind)
    twin.__dict__ |= vars(optimizer) | {"defaults": dict(optimizer.defaults)}
    twin.__setstate__({"state": defaultdict(dict), "param_groups": [{**saved, "params": []}]})
    return live.keys() - {*twin.param_groups[0], *PARAMETERS}


def of_another_kind(optimizer: Optimizer, number: int, missing: Iterable[str]) -> str:
    """What is to be said of a group that was saved without these options."""
    return (
        f"saved by another kind of optimizer than a {type(optimizer).__qualname__}: group {number} was saved without "
        f"{', '.join(sorted(missing))}"
    )
