"""`Difference`: in what the tracked objects aren't those that were saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dtrain.checkpoint.format import Manifest
from dtrain.checkpoint.tree import dtype_name, flatten

Kind = Literal["missing", "unexpected", "reshaped", "retyped", "other"]

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
