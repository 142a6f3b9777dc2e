"""`load`: what was saved, or a part of it, into models and optimizers outside of a run.

    load("runs/x", {"model": model})                                       the weights of the newest good checkpoint
    load("runs/x", {"model": model, "optimizer": optimizer}, step=2000)    to go on from there in a loop of one's own
    load("runs/x", {"model": model}, only=["model.encoder.*"])             a part
    load("runs/x", {"model": model}, skip=["model.head.*"])                all but a part, which stays as it is

Patterns are those of a shell, and match whole dotted names such as "model.encoder.0.weight". What differs between the
objects and what was saved is an error that lists all of it, unless it is allowed by name.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain.checkpoint.format import Manifest
from dtrain.checkpoint.manager import from_rank_0, on_all_ranks
from dtrain.checkpoint.ranking import best_step
from dtrain.checkpoint.reader import load_tensors
from dtrain.checkpoint.sources import Source, open_source
from dtrain.checkpoint.state import Difference, State, listed
from dtrain.checkpoint.tree import decode, flatten
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError, UsageError
from dtrain.storage.places import is_remote, storage_at

_PARAMETERS = ("params", "param_names")


@dataclass(frozen=True)
class Loaded:
    """What `load` has done."""

    step: int
    """How many optimizer steps the state is the outcome of; 0 where nobody has written that down."""
    tensors: tuple[str, ...]
    """Names of the tensors that were loaded."""
    left: tuple[str, ...]
    """Names of those of the checkpoint's tensors of these objects that were not."""
    bytes_read: int
    """By this rank."""


def load(
    source: str | os.PathLike[str],
    objects: Mapping[str, Any],
    *,
    step: int | Literal["best"] | None = None,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    allow_reshaped: Iterable[str] = (),
    allow_retyped: Iterable[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load objects from a run folder, or from whatever else holds weights. With several ranks, all must reach this.

    :param source: a run folder, one checkpoint's folder, what stock DCP has saved, safetensors (a file, a folder or an
        index), or a file of `torch.save`. Runs, checkpoints and safetensors may be named by their URLs.
    :param objects: by the names that they were tracked under. What else was saved isn't asked for.
    :param step: which checkpoint of a run folder: the one of a step, or `"best"` by the metric that the run goes by;
        without it the newest good one.
    :param only: patterns of what is loaded; without any, all is. What isn't chosen is neither loaded nor compared.
    :param skip: patterns of what isn't.
    :param allow_missing: patterns of what the checkpoint may lack; it stays as it is.
    :param allow_unexpected: patterns of what only the checkpoint may have; it is passed over.
    :param allow_reshaped: patterns of what may have another shape now; it stays as it is.
    :param allow_retyped: patterns of what may have another type now; it is converted.
    :param storage_options: how a URL is reached, see `Config.storage_options`.
    :raises UsageError: the objects aren't given by names, or an option is of another kind.
    :raises ConfigError: there is nothing of the kind, or the options aren't for it.
    :raises StateError: something differs and isn't allowed, or a pattern matches nothing; nothing has changed then.
    :raises NoGoodCheckpoint: the run has no checkpoint that is good.
    :raises Damaged: a byte isn't what was saved. What the objects hold then is worth nothing.
    """
    if not isinstance(objects, Mapping):
        raise UsageError(
            f"load(source, {type(objects).__qualname__}): give the objects by the names that they were tracked under, "
            "such as {'model': model}"
        )
    chosen = _Choice(_patterns("only", only), _patterns("skip", skip))
    allowed = {
        "missing": _patterns("allow_missing", allow_missing),
        "unexpected": _patterns("allow_unexpected", allow_unexpected),
        "reshaped": _patterns("allow_reshaped", allow_reshaped),
        "retyped": _patterns("allow_retyped", allow_retyped),
    }
    state = State()
    state.track(objects)
    found = find(source, step, storage_options)
    manifest = found.manifest
    differences = state.differences(manifest)
    names = _names({name: state.state_of(name) for name in objects}) | objects.keys()
    names |= _names({name: _decoded(manifest)[name] for name in objects if name in manifest.tree})
    names |= {difference.name for difference in differences}
    given = {"only": chosen.only, "skip": chosen.skip} | {f"allow_{kind}": known for kind, known in allowed.items()}
    for option, patterns in given.items():
        _check_patterns(option, patterns, names, found.place)
    others = manifest.tree.keys() - objects.keys()
    refused = [
        difference
        for difference in differences
        if difference.name not in others
        and chosen.any(difference.name, names)
        and not _matches(difference.name, allowed.get(difference.kind, []))
    ]
    if refused:
        raise StateError(
            f"the objects are not what was saved in {found.place}:\n  {listed(refused)}\n"
            "Allow by name what is meant to differ (allow_missing, allow_unexpected, allow_reshaped, allow_retyped), "
            "or leave it out with skip."
        )
    plan = _Plan(state, manifest, chosen, differences)
    cast = {difference.name for difference in differences if difference.kind == "retyped"}
    read: list[int] = []
    problem = _on_all_ranks(
        lambda: read.append(load_tensors(found.storage, found.folder, manifest, plan.targets, cast=cast))
    )
    if problem:
        raise Damaged(f"{problem}; take another step or another copy, and objects that are made anew")
    state.load(plan.states())
    left = (name for name in manifest.tensors if name.partition(".")[0] in objects and name not in plan.targets)
    return Loaded(manifest.step, tuple(plan.targets), tuple(left), read[0])


def find(
    source: str | os.PathLike[str],
    step: int | Literal["best"] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """A run folder's newest good checkpoint, or that of a step, or the best; or what else the source holds.

    With several ranks, all must reach this: they take the one that rank 0 has found.

    :raises: see `open_source`.
    """
    if isinstance(step, str) and step != "best":
        raise UsageError(f"step={step!r}: give a number or 'best'; without a step it is the newest good one")
    if storage_options and not is_remote(source):
        raise ConfigError(f"storage_options ({', '.join(storage_options)}) are for a URL, and {source} is none")
    if not _several_ranks():
        return _find(source, step, storage_options)
    found: list[Source] = []

    def on_rank_0() -> tuple[str, Any]:
        found.append(_find(source, step, storage_options))
        inside = found[0].kind == "checkpoint"
        return (found[0].place, None) if inside else (str(source), step)  # a run's is inside

    place, number = from_rank_0(on_rank_0)
    return found[0] if found else open_source(place, step=number, storage_options=storage_options)


def _find(
    path: str | os.PathLike[str], step: int | Literal["best"] | None, storage_options: Mapping[str, Any] | None
) -> Source:
    """:raises NoGoodCheckpoint: also in place of `Damaged`, which is for what is found while tensors are read."""
    if step == "best":
        step = best_step(storage_at(path, storage_options))
    try:
        found = open_source(path, step=step, storage_options=storage_options)
    except Damaged as error:
        raise NoGoodCheckpoint(
            f"{path} has no good checkpoint: {error}; take another step, or bring the files back"
        ) from error
    for text in found.passed_over:
        warnings.warn(text, stacklevel=4)
    return found


class _Choice:
    """What `only` and `skip` choose."""

    def __init__(self, only: Sequence[str], skip: Sequence[str]) -> None:
        self.only = only
        self.skip = skip

    def __call__(self, name: str) -> bool:
        return (not self.only or _matches(name, self.only)) and not _matches(name, self.skip)

    def any(self, name: str, names: Iterable[str]) -> bool:
        """Whether something of it is chosen, be it a tensor or what holds several of `names`."""
        return any(map(self, [inner for inner in names if inner.startswith(f"{name}.")] or [name]))

    def whole(self, name: str, leaves: Sequence[str]) -> bool:
        """Whether something is chosen that means nothing in part. :raises StateError: a part of it is."""
        count = sum(map(self, leaves))
        if 0 < count < len(leaves):
            raise StateError(
                f"{name} can be loaded only as a whole, and the patterns choose {count} of {len(leaves)} of its "
                f"values; choose or skip {name + '*'!r}"
            )
        return count > 0


class _Plan:
    """What is loaded.

    :ivar targets: the tensors to load into, by their names in the manifest.
    """

    def __init__(self, state: State, manifest: Manifest, chosen: _Choice, differences: list[Difference]) -> None:
        self._state = state
        self._manifest = manifest
        self._chosen = chosen
        self._left = {difference.name for difference in differences if difference.kind != "retyped"}
        tree = _decoded(manifest)
        self._units: dict[str, list[str]] = {}
        """The values that are loaded, each as a whole, with the names of what they are made of."""
        for name, value in state.objects.items():
            if name not in tree:
                continue
            if isinstance(value, nn.Module):
                self._take(f"{name}.", tree[name])
            elif isinstance(value, Optimizer):
                self._take_optimizer(name, tree[name])
            else:
                self._take("", {name: tree[name]})
        leaves = {leaf for unit in self._units.values() for leaf in unit}
        self.targets = state.targets_for({name: item for name, item in manifest.tensors.items() if name in leaves})

    def states(self) -> dict[str, Any]:
        """What each object is to be given, once the targets are loaded."""
        tree = _decoded(self._manifest, self.targets)
        found: dict[str, Any] = {}
        for name, value in self._state.objects.items():
            if isinstance(value, nn.Module):
                found[name] = value.state_dict(keep_vars=True)
                found[name].update(self._taken(f"{name}.", tree.get(name, {})))
            elif isinstance(value, Optimizer):
                if name in tree:
                    found[name] = self._optimizer(name, tree[name])
            else:
                found |= self._taken("", {name: tree.get(name)})
        return found

    def _take(self, prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            leaves = sorted(_names({name: value})) or [name]
            if name not in self._left and self._left.isdisjoint(leaves) and self._chosen.whole(name, leaves):
                self._units[name] = leaves

    def _taken(self, prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if f"{prefix}{key}" in self._units}

    def _take_optimizer(self, name: str, saved: Any) -> None:
        if name in self._left:
            return
        live = self._state.state_of(name)
        modules = list(self._state.modules())
        prefix = f"{modules[0]}." if len(modules) == 1 else ""
        known = {key for group in live["param_groups"] for key in group["params"] if prefix + key not in self._left}
        self._take(f"{name}.state.", {key: kept for key, kept in saved["state"].items() if key in known})
        if len(saved["param_groups"]) == len(live["param_groups"]):
            for number, group in enumerate(saved["param_groups"]):
                self._take(f"{name}.param_groups.{number}.", _options(group))

    def _optimizer(self, name: str, saved: Any) -> dict[str, Any]:
        live = self._state.state_of(name)
        groups = []
        for number, group in enumerate(live["param_groups"]):
            prefix = f"{name}.param_groups.{number}."
            same = len(saved["param_groups"]) == len(live["param_groups"])
            options = _options(saved["param_groups"][number]) if same else {}
            taken = self._taken(prefix, options)
            # One that is taken as a whole must have all that the optimizer asks for: it is checked for that.
            groups.append((taken if taken and taken.keys() == options.keys() else group | taken) | _parameters(group))
        return {"state": live["state"] | self._taken(f"{name}.state.", saved["state"]), "param_groups": groups}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of an optimizer's parameter group, without the parameters."""
    return {key: value for key, value in group.items() if key not in _PARAMETERS}


def _parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key in _PARAMETERS}


def _names(tree: Mapping[str, Any]) -> set[str]:
    return set(flatten(tree))


def _decoded(manifest: Manifest, tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The saved tree, with something in the place of tensors that aren't given."""
    nothing = torch.empty(0)
    tree: dict[str, Any] = decode(manifest.tree, lambda name: (tensors or {}).get(name, nothing))
    return tree


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(option: str, given: Iterable[str]) -> list[str]:
    """:raises UsageError: they are none."""
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{option}={given!r}: {option} takes patterns, such as ['model.head.*']")
    return patterns


def _check_patterns(option: str, patterns: Iterable[str], names: Iterable[str], place: str) -> None:
    """:raises StateError: a pattern matches nothing."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)
            hint = f"the closest are {', '.join(close)}" if close else f"there are {', '.join(sorted(names)[:3])}, ..."
            raise StateError(f"{option}={pattern!r} matches nothing in {place} or in the objects; {hint}")


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _on_all_ranks(work: Callable[[], object]) -> str:
    """Read something. :returns: what was found damaged, by any of the ranks."""
    if _several_ranks():
        return on_all_ranks(work, (Damaged,))
    try:
        work()
    except Damaged as error:
        return str(error)
    return ""
