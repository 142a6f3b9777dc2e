"""What the user tracks, as one tree that can be saved, and back.

A module's tensors are loaded in place; an optimizer's state is kept by the names of its parameters, not by their
numbers, so that it means the same under any layout; everything else goes through `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dtrain.checkpoint.format import Manifest, TensorItem
from dtrain.checkpoint.tree import decode, dtype_name, dtype_named, flatten
from dtrain.errors import StateError, UsageError

RUN = "dtrain"
"""The name under which the run's own position is kept."""

_MOST_NAMED = 20
"""More differences than this are counted instead of listed."""


class State:
    """The tracked objects by name."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def track(self, objects: Mapping[str, Any]) -> None:
        """:raises UsageError: a name is taken, or an object has nothing to save."""
        for name, value in objects.items():
            if name in self.objects or name == RUN:
                raise UsageError(f"track({name}=...): the name is taken; choose another")
            if not isinstance(value, torch.Generator) and not (
                callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
            ):
                raise UsageError(
                    f"track({name}=...): a {type(value).__qualname__} has no state_dict and load_state_dict; "
                    "give it both, or track the object that has them"
                )
            self.objects[name] = bare(value) if isinstance(value, nn.Module) else value

    def modules(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self.objects.items() if isinstance(value, nn.Module)}

    def tree(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, the tensors being the live ones.

        :param position: the run's own part: step, cursor and the like.
        """
        return {RUN: dict(position)} | {name: self._state_of(name) for name in self.objects}

    def targets(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """A tensor to load into for every tensor of a checkpoint, by its dotted name.

        :raises StateError: the tracked objects aren't those that were saved; it lists each difference.
        """
        self._compare(manifest)
        live: dict[str, torch.Tensor] = {
            f"{name}.{key}": leaf
            for name, module in self.modules().items()
            for key, (_, leaf) in flatten(module.state_dict()).items()
        }
        parameters = {
            f"{name}.state.{parameter_name}": parameter
            for name, value in self.objects.items()
            if isinstance(value, Optimizer)
            for parameter, parameter_name in self._parameter_names(name, value).items()
        }

        def target(name: str, item: TensorItem) -> torch.Tensor:
            if name in live:
                return live[name]
            parameter = parameters.get(name.rpartition(".")[0])
            # A count of steps is kept on the CPU by every optimizer that doesn't ask for it elsewhere.
            if parameter is not None and item.shape and list(parameter.shape) == item.shape:
                return torch.empty_like(parameter, dtype=dtype_named(item.dtype), requires_grad=False)
            return torch.empty(item.shape, dtype=dtype_named(item.dtype))

        return {name: target(name, item) for name, item in manifest.tensors.items()}

    def apply(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Put a checkpoint's state into the objects, once its tensors are loaded; returns the run's own part."""
        tree: dict[str, Any] = decode(manifest.tree, tensors.__getitem__)
        for name, value in sorted(self.objects.items(), key=lambda pair: _order(pair[1])):
            if isinstance(value, torch.Generator):
                value.set_state(tree[name]["state"])
            elif isinstance(value, Optimizer):
                self._load_optimizer(name, value, tree[name])
            elif isinstance(value, nn.Module):
                # A state dict tells the modules' versions in an attribute; without it they would take what was
                # saved for the oldest form of it, and convert it.
                saved = OrderedDict(tree[name])
                saved._metadata = getattr(value.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
                value.load_state_dict(saved)
            else:
                value.load_state_dict(tree[name])
        position: dict[str, Any] = tree[RUN]
        return position

    def _state_of(self, name: str) -> Any:
        value = self.objects[name]
        if isinstance(value, torch.Generator):
            return {"state": value.get_state()}
        if not isinstance(value, Optimizer):
            return value.state_dict()
        names = list(self._parameter_names(name, value).values())
        state = value.state_dict()
        return {
            "state": {names[index]: kept for index, kept in state["state"].items()},
            "param_groups": [
                group | {"params": [names[index] for index in group["params"]]} for group in state["param_groups"]
            ],
        }

    def _load_optimizer(self, name: str, optimizer: Optimizer, saved: dict[str, Any]) -> None:
        names = self._parameter_names(name, optimizer)
        index_of = {parameter_name: index for index, parameter_name in enumerate(names.values())}
        options = [set(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(
            {
                "state": {index_of[key]: kept for key, kept in saved["state"].items()},
                "param_groups": [
                    group | {"params": [index_of[key] for key in group["params"]]} for group in saved["param_groups"]
                ],
            }
        )
        for number, (before, group) in enumerate(zip(options, optimizer.param_groups, strict=True)):
            if missing := sorted(before - set(group)):
                raise StateError(
                    f"{name}: saved by another kind of optimizer than a {type(optimizer).__qualname__}: group {number} "
                    f"was saved without {', '.join(missing)}"
                )
        # load_state_dict casts to the parameter's type; what was kept in another one comes back as it was.
        for parameter, parameter_name in names.items():
            for key, value in saved["state"].get(parameter_name, {}).items():
                found = optimizer.state[parameter].get(key)
                if isinstance(value, torch.Tensor) and found is not None and found.dtype != value.dtype:
                    optimizer.state[parameter][key] = value.to(found.device)

    def _parameter_names(self, name: str, optimizer: Optimizer) -> dict[torch.Tensor, str]:
        """The optimizer's parameters in its own order, with their names in the tracked modules.

        :raises StateError: a parameter is in none of them.
        """
        modules = self.modules()
        names: dict[torch.Tensor, str] = {}
        for module_name, module in modules.items():
            prefix = f"{module_name}." if len(modules) > 1 else ""
            for key, parameter in module.named_parameters():
                names[parameter] = prefix + key
        found: dict[torch.Tensor, str] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter not in names:
                    raise StateError(
                        f"{name}: a parameter of shape {tuple(parameter.shape)} in group {number} belongs to no "
                        "tracked module; track the module too"
                    )
                found[parameter] = names[parameter]
        return found

    def _compare(self, manifest: Manifest) -> None:
        saved_names, names = set(manifest.tree) - {RUN}, set(self.objects)
        lines = [f"{name}: tracked now, but not in the checkpoint" for name in sorted(names - saved_names)]
        lines += [f"{name}: in the checkpoint, but not tracked now" for name in sorted(saved_names - names)]
        for name, module in self.modules().items():
            if name in saved_names:
                saved = {
                    key.removeprefix(f"{name}."): (tuple(item.shape), item.dtype)
                    for key, item in manifest.tensors.items()
                    if key.startswith(f"{name}.")
                }
                live = {
                    key: (tuple(leaf.shape), dtype_name(leaf.dtype))
                    for key, (_, leaf) in flatten(module.state_dict()).items()
                    if isinstance(leaf, torch.Tensor)
                }
                lines += [f"{name}.{line}" for line in _differences(saved, live)]
        # An optimizer that differs because its model does would only repeat the model's list.
        for name, value in self.objects.items() if not lines else ():
            if isinstance(value, Optimizer):
                if not isinstance(manifest.tree[name], dict) or "param_groups" not in manifest.tree[name]:
                    lines.append(f"{name}: an optimizer now, but something else was saved")
                    continue
                saved_groups = [set(group["params"]) for group in manifest.tree[name]["param_groups"]]
                groups = [set(group["params"]) for group in self._state_of(name)["param_groups"]]
                if len(saved_groups) != len(groups):
                    lines.append(f"{name}: saved with {len(saved_groups)} parameter groups, now {len(groups)}")
                    continue
                for number, (before, now) in enumerate(zip(saved_groups, groups, strict=True)):
                    lines += [f"{name}: {key} left group {number}" for key in sorted(before - now)]
                    lines += [f"{name}: {key} is new in group {number}" for key in sorted(now - before)]
        if lines:
            more = [f"... and {len(lines) - _MOST_NAMED} more"] if len(lines) > _MOST_NAMED else []
            raise StateError(
                f"what is tracked is not what was saved at step {manifest.step}:\n  "
                + "\n  ".join(lines[:_MOST_NAMED] + more)
                + "\nGo back to the model that was saved, or start in another run folder."
            )


def bare(module: nn.Module) -> nn.Module:
    """The user's own module, without what was wrapped around it."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's wrapper
            module = inner
        else:
            return module


def _order(value: object) -> int:
    """Modules first, then optimizers, then what may refer to them."""
    return 0 if isinstance(value, nn.Module) else 1 if isinstance(value, Optimizer) else 2


def _differences(
    saved: Mapping[str, tuple[tuple[int, ...], str]], live: Mapping[str, tuple[tuple[int, ...], str]]
) -> Iterable[str]:
    for key in sorted(saved.keys() | live.keys()):
        before, now = saved.get(key), live.get(key)
        if before is None:
            yield f"{key}: not in the checkpoint"
        elif now is None:
            yield f"{key}: in the checkpoint only"
        elif before[0] != now[0]:
            yield f"{key}: saved with shape {before[0]}, now {now[0]}"
        elif before[1] != now[1]:
            yield f"{key}: saved as {before[1]}, now {now[1]}"
