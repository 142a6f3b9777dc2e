"""What the user tracks, as one tree that can be saved, and back.

A module's tensors are loaded in place; an optimizer's state is kept by the names of its parameters, not by their
numbers, so that it means the same under any layout; everything else goes through `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dtrain.checkpoint.difference import (
    Difference,
    Kind,
    is_extra,
    lacking,
    listed,
    module_differences,
    of_another_kind,
)
from dtrain.checkpoint.format import Manifest, TensorItem
from dtrain.checkpoint.tree import decode, dtype_named, flatten, is_expanded
from dtrain.errors import StateError, UsageError

RUN = "dtrain"
"""The name under which the run's own position is kept."""


class State:
    """The tracked objects by name."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self._checked: set[int] = set()
        self._left_off: dict[str, str] = {}

    def track(self, objects: Mapping[str, Any]) -> None:
        """:raises UsageError: a name is taken, or an object has nothing to save."""
        for name, value in objects.items():
            if not isinstance(name, str):
                raise UsageError(f"track({name!r}): a name is a text; give the object one, such as 'model'")
            if name in self.objects or name == RUN:
                raise UsageError(f"track({name}=...): the name is taken; choose another")
            if "." in name or name.startswith("$"):
                raise UsageError(f"track({name!r}): a name has no dots, and no dollar at its front; choose another")
            if not isinstance(value, torch.Generator) and not (
                callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
            ):
                raise UsageError(
                    f"track({name}=...): a {type(value).__qualname__} has no state_dict and load_state_dict; "
                    "give it both, or track the object that has them"
                )
            self.objects[name] = bare(value) if isinstance(value, nn.Module) else value

    def check(self, optimizer: Optimizer, *schedulers: object) -> None:
        """:raises UsageError: one of them, or what it trains, isn't tracked, and would begin anew after a failure."""
        averages = vars(optimizer).get("_dtrain_averages", [])
        for thing in (optimizer, *schedulers, *averages):
            if id(thing) in self._checked:
                continue
            if not any(thing is value for value in self.objects.values()):
                what = "an optimizer whose EMA" if thing in averages else f"a {type(thing).__qualname__} that"
                raise UsageError(
                    f"step.update was given {what} isn't tracked, and would begin anew after a failure: give it to "
                    "run.track, before run.steps"
                )
            known = {id(p) for value in self.modules().values() for p in value.parameters()}
            groups = optimizer.param_groups if thing is optimizer else []
            for parameter in (parameter for group in groups for parameter in group["params"]):
                if parameter.requires_grad and id(parameter) not in known:
                    raise UsageError(
                        f"the optimizer trains a parameter of shape {tuple(parameter.shape)} that no tracked module "
                        "has, and that would begin anew after a failure: give its module to run.track"
                    )
            self._checked.add(id(thing))

    def modules(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self.objects.items() if isinstance(value, nn.Module)}

    def tree(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, the tensors being the live ones.

        :param position: the run's own part: step, cursor and the like.
        :raises StateError: it could be saved, but not be loaded again.
        """
        tree = {RUN: dict(position)} | {name: self.state_of(name) for name in self.objects}
        for name in self.modules():
            for key, leaf in tree[name].items():
                if is_expanded(leaf) and not is_extra(key):
                    raise _expanded(f"{name}.{key}")
        return tree

    def targets(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """A tensor to load into for every tensor of a checkpoint, by its dotted name.

        :raises StateError: the tracked objects aren't those that were saved; it lists each difference.
        """
        self._compare(manifest)
        return self.targets_for(manifest.tensors)

    def targets_for(self, items: Mapping[str, TensorItem]) -> dict[str, torch.Tensor]:
        """A tensor to load into for each of these: a module's own, and new ones for the rest.

        :raises StateError: one of a module's has no memory of its own.
        """
        leaves: dict[str, Any] = {
            f"{name}.{key}": leaf
            for name, module in self.modules().items()
            for key, (_, leaf) in flatten(module.state_dict(keep_vars=True)).items()
        }
        parameters = {
            f"{name}.state.{parameter_name}": parameter
            for name, value in self.objects.items()
            if isinstance(value, Optimizer)
            for parameter, parameter_name in self._parameter_names(name, value).items()
        }

        def target(name: str, item: TensorItem) -> torch.Tensor:
            leaf: torch.Tensor | None = leaves.get(name)
            if leaf is not None and not is_extra(name):
                if is_expanded(leaf):
                    raise _expanded(name)
                return leaf
            owner = name
            while owner and owner not in parameters:  # its state may lie deep in lists and dicts
                owner = owner.rpartition(".")[0]
            parameter = parameters.get(owner)
            # A count of steps is kept on the CPU by every optimizer that doesn't ask for it elsewhere.
            if parameter is not None and item.shape and list(parameter.shape) == item.shape:
                return torch.empty_like(parameter, dtype=dtype_named(item.dtype), requires_grad=False)
            # Extra state may have another form at any time; what is known is where its tensors are used.
            device = leaf.device if isinstance(leaf, torch.Tensor) else None
            return torch.empty(item.shape, dtype=dtype_named(item.dtype), device=device)

        targets = {name: target(name, item) for name, item in items.items()}
        for name, found in targets.items():
            if found.is_meta:
                raise StateError(
                    f"{name}: on the meta device, where nothing can be loaded into; give the module memory first, with "
                    "module.to_empty(device=...)"
                )
        return targets

    def apply(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Put a checkpoint's state into the objects, once its tensors are loaded; returns the run's own part."""
        tree: dict[str, Any] = decode(manifest.tree, tensors.__getitem__)
        self.load({name: tree[name] for name in self.objects if name in tree})
        position: dict[str, Any] = tree[RUN]
        return position

    def load(self, states: Mapping[str, Any]) -> None:
        """Give objects their state: modules first, then optimizers, then what may refer to them."""
        for name, state in sorted(states.items(), key=lambda pair: _order(self.objects[pair[0]])):
            value = self.objects[name]
            if isinstance(value, torch.Generator):
                value.set_state(state["state"])
            elif isinstance(value, Optimizer):
                self._load_optimizer(name, value, state)
            elif isinstance(value, nn.Module):
                # A state dict tells the modules' versions in an attribute; without it they would take what was
                # saved for the oldest form of it, and convert it. Tensors that are the module's own cost no copy.
                saved = OrderedDict(state)
                saved._metadata = getattr(value.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
                value.load_state_dict(saved)
            else:
                value.load_state_dict(state)

    def state_of(self, name: str) -> Any:
        value = self.objects[name]
        if isinstance(value, torch.Generator):
            return {"state": value.get_state()}
        if not isinstance(value, Optimizer):
            return value.state_dict(keep_vars=True) if isinstance(value, nn.Module) else value.state_dict()
        names = list(self._parameter_names(name, value).values())
        state = value.state_dict()
        more: list[Any] = [key for key in state if key not in ("state", "param_groups")]
        more += [key for key in state.get("state", ()) if not isinstance(key, int)]
        if more:
            raise StateError(
                f"{name}: a {type(value).__qualname__} keeps {', '.join(map(repr, more))} beside the states of its "
                "parameters; keep it in a parameter group, or in an object of its own that is tracked"
            )
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
            if missing := before - set(group):
                raise StateError(f"{name}: {of_another_kind(optimizer, number, missing)}")

        # load_state_dict casts to the parameter's type; what was kept in another one comes back as it was.
        def uncast(loaded: Any, kept: Any) -> Any:
            if isinstance(loaded, torch.Tensor) and isinstance(kept, torch.Tensor):
                return loaded if loaded.dtype == kept.dtype else kept.to(loaded.device)
            if isinstance(loaded, dict) and isinstance(kept, dict):
                return {key: uncast(value, kept.get(key)) for key, value in loaded.items()}
            if isinstance(loaded, list | tuple) and isinstance(kept, list | tuple) and len(loaded) == len(kept):
                return type(loaded)(map(uncast, loaded, kept))
            return kept if isinstance(kept, str) else loaded  # it takes a text for a list of characters

        for parameter, parameter_name in names.items():
            if parameter_name in saved["state"]:
                optimizer.state[parameter] = uncast(optimizer.state[parameter], saved["state"][parameter_name])

    def name_as(self, manifest: Manifest) -> None:
        """From now on, name the optimizers' parameters as in a checkpoint, of a run that may have tracked other modules
        beside these."""
        known = [f"{module}." for module in self.modules() if module in manifest.tree]
        for name, value in self.objects.items():
            saved = manifest.tree.get(name)
            if isinstance(value, Optimizer) and isinstance(saved, dict) and "param_groups" in saved:
                keys = {key for group in saved["param_groups"] for key in group["params"]}
                found = {}
                for form in (self.left_off(name), "", *(known if len(known) == 1 else ())):
                    self._left_off[name] = form
                    found[form] = len(keys.intersection(self._parameter_names(name, value).values()))
                self._left_off[name] = max(found, key=found.__getitem__)

    def left_off(self, name: str) -> str:
        """What the parameters of an optimizer are named without: the module before the dot, where there is only one."""
        modules = list(self.modules())
        return self._left_off.get(name, f"{modules[0]}." if len(modules) == 1 else "")

    def _parameter_names(self, name: str, optimizer: Optimizer) -> dict[torch.Tensor, str]:
        """The optimizer's parameters in its own order, with their names in the tracked modules.

        :raises StateError: a parameter is in none of them.
        """
        left_off = self.left_off(name)
        names: dict[torch.Tensor, str] = {}
        for module_name, module in self.modules().items():
            for key, parameter in module.named_parameters():
                names[parameter] = f"{module_name}.{key}".removeprefix(left_off)
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

    def differences(self, manifest: Manifest) -> list[Difference]:
        """In what the tracked objects aren't those that were saved."""
        saved_names, names = set(manifest.tree) - {RUN}, set(self.objects)
        has = f"tracked now, but not in the checkpoint, which has {', '.join(sorted(saved_names)) or 'nothing'}"
        found = [Difference(name, "missing", has) for name in names - saved_names]
        found += [
            Difference(name, "unexpected", "in the checkpoint, but not tracked now") for name in saved_names - names
        ]
        found.sort()
        differing: set[str] = set()
        for name, module in self.modules().items():
            if name in saved_names:
                more = list(module_differences(name, module, manifest))
                differing |= {difference.name for difference in more}
                found += more
        for name, value in self.objects.items():
            if isinstance(value, Optimizer) and name in saved_names:
                found += self._optimizer_differences(name, value, manifest.tree[name], differing)
        return found

    def _optimizer_differences(
        self, name: str, optimizer: Optimizer, saved: Any, differing: Container[str]
    ) -> Iterator[Difference]:
        """:param differing: tensors of which it is known already; their state would only repeat it."""
        if not isinstance(saved, dict) or "param_groups" not in saved:
            yield Difference(name, "other", "an optimizer now, but something else was saved")
            return
        live = self.state_of(name)["param_groups"]
        before_groups, now_groups = ([set(group["params"]) for group in of] for of in (saved["param_groups"], live))
        if len(before_groups) != len(now_groups):
            counts = f"saved with {len(before_groups)} parameter groups, now {len(now_groups)}"
            yield Difference(f"{name}.param_groups", "other", counts, of=name)
            return
        left_off = self.left_off(name)
        for number, (before, now) in enumerate(zip(before_groups, now_groups, strict=True)):
            for key in sorted(before ^ now, key=str):  # in a file of torch.save they are numbers
                if key in differing or f"{left_off}{key}" in differing:
                    continue
                kind: Kind = "unexpected" if key in before else "missing"
                text = f"{key} left group {number}" if key in before else f"{key} is new in group {number}"
                yield Difference(f"{name}.state.{key}", kind, text, of=name)
            if missing := lacking(optimizer, saved["param_groups"][number], live[number]):
                text = of_another_kind(optimizer, number, missing)
                yield Difference(f"{name}.param_groups.{number}", "options", text, of=name)

    def _compare(self, manifest: Manifest) -> None:
        found = self.differences(manifest)
        if manifest.step == 0:  # imported weights: what they come without, such as an optimizer, begins anew
            found = [one for one in found if one.kind != "missing" or one.name not in self.objects]
        if found:
            raise StateError(
                f"what is tracked is not what was saved at step {manifest.step}:\n  {listed(found)}\n"
                "Go back to the model that was saved, or start in another run folder."
            )


def position_of(manifest: Manifest) -> dict[str, Any]:
    """The run's own part of a checkpoint, with empty tensors where a stream of data has some; {} if no run saved it."""
    position: dict[str, Any] = decode(manifest.tree.get(RUN, {}), lambda _: torch.empty(0))
    return position


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


def _expanded(name: str) -> StateError:
    return StateError(f"{name}: nothing can be loaded into an expanded tensor; keep its .contiguous() in the module")
