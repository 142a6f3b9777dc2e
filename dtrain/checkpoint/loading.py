"""`load`: what was saved, or a part of it, into models and optimizers outside of a run.

    load("runs/x", {"model": model})                                       the weights of the newest good checkpoint
    load("runs/x", {"model": model, "optimizer": optimizer}, step=2000)    to go on from there in a loop of one's own
    load("runs/x", {"model": model}, only=["model.encoder.*"])             a part
    load("runs/x", {"model": model}, skip=["model.head.*"])                all but a part, which stays as it is

Patterns are those of a shell, and match whole dotted names such as "model.encoder.0.weight", or the name of an object,
such as "optimizer", for all of it. What differs between the objects and what was saved is an error that lists all of
it, unless it is allowed by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain.checkpoint.choice import Choice, check_patterns, matches, patterns_of
from dtrain.checkpoint.difference import PARAMETERS, Difference, listed
from dtrain.checkpoint.format import Manifest, digest
from dtrain.checkpoint.layout import bytes_of, plain
from dtrain.checkpoint.manager import from_all_ranks, from_rank_0
from dtrain.checkpoint.newest import still_there
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.reader import load_tensors
from dtrain.checkpoint.source import Source
from dtrain.checkpoint.sources import Step, open_source
from dtrain.checkpoint.state import State
from dtrain.checkpoint.tree import decode, flatten
from dtrain.checkpoint.wants import tied, untied
from dtrain.errors import ConfigError, Damaged, DtrainError, NoGoodCheckpoint, StateError, UsageError
from dtrain.storage.places import is_remote, on_disk

T = TypeVar("T")


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
    :raises ConfigError: there is nothing of the kind, or the options aren't for it, or the run has deleted it while it
        was read. What the objects hold then is worth nothing.
    :raises StateError: something differs and isn't allowed, or a pattern matches nothing; nothing has changed then.
    :raises NoGoodCheckpoint: the run has no checkpoint that is good.
    :raises Damaged: a byte isn't what was saved. What the objects hold then is worth nothing.
    """
    allowed = {
        "missing": patterns_of("allow_missing", allow_missing),
        "unexpected": patterns_of("allow_unexpected", allow_unexpected),
        "reshaped": patterns_of("allow_reshaped", allow_reshaped),
        "retyped": patterns_of("allow_retyped", allow_retyped),
    }
    chosen = Choice(patterns_of("only", only), patterns_of("skip", skip))
    state = _on_all_ranks(lambda: _tracked(objects))
    found = find(source, step, storage_options)
    plan = _on_all_ranks(lambda: _planned(state, found, chosen, allowed))
    try:
        read = _on_all_ranks(lambda: plan.read(found, plan.targets))
    except Damaged as error:
        raise Damaged(f"{error}; take another step or another copy, and objects that are made anew") from error
    _on_all_ranks(lambda: state.load(plan.states()))
    left = (n for n in found.manifest.tensors if n.partition(".")[0] in objects and n not in plan.targets)
    return Loaded(found.manifest.step, tuple(plan.targets), tuple(left), read)


def _tracked(objects: Mapping[str, Any]) -> State:
    if not isinstance(objects, Mapping):
        raise UsageError(
            f"load(source, {type(objects).__qualname__}): give the objects by the names that they were tracked under, "
            "such as {'model': model}"
        )
    state = State()
    state.track(objects)
    return state


def _planned(state: State, found: Source, chosen: Choice, allowed: Mapping[str, Sequence[str]]) -> _Plan:
    """:raises StateError: something differs and isn't allowed, or a pattern matches nothing."""
    objects, manifest = state.objects, found.manifest
    state.name_as(manifest)
    differences = state.differences(manifest)
    names = _names({name: state.state_of(name) for name in objects}) | objects.keys()
    names |= _names({name: _decoded(manifest)[name] for name in objects if name in manifest.tree})
    names |= {difference.name for difference in differences}
    given = {"only": chosen.only, "skip": chosen.skip} | {f"allow_{kind}": known for kind, known in allowed.items()}
    others = manifest.tree.keys() - objects.keys()
    for option, patterns in given.items():
        check_patterns(option, patterns, names - others if option == "only" else names, found.place)
    refused = [
        difference
        for difference in differences
        if difference.name not in others
        and _is_chosen(chosen, difference, names)
        and not matches(difference.name, allowed.get(difference.kind, []))
    ]
    if refused:
        raise StateError(
            f"the objects are not what was saved in {found.place}:\n  {listed(refused)}\n"
            "Allow by name what is meant to differ (allow_missing, allow_unexpected, allow_reshaped, allow_retyped), "
            "or leave it out with skip."
        )
    plan = _Plan(state, manifest, chosen, differences)
    for names_of_one in tied(plan.targets) if found.kind != "checkpoint" else ():  # whose digests tell if they differ
        apart = {name: torch.empty_like(plan.targets[name]) for name in names_of_one}
        plan.read(found, apart)
        one, other = (digest(bytes_of(plain(local_part(tensor)))) for tensor in apart.values())
        if one != other:
            raise untied(*names_of_one)
    return plan


def _is_chosen(chosen: Choice, difference: Difference, names: set[str]) -> bool:
    if difference.kind != "options":
        return chosen.any(difference.name, names)
    # Some options may be had of another kind of optimizer, and the rest stays as it is; but nothing of its state.
    return chosen.all(difference.name, names) or chosen.any(f"{difference.of}.state", names)


def find(
    source: str | os.PathLike[str],
    step: Step = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Source:
    """A run folder's newest good checkpoint, or that of a step, or the best; or what else the source holds.

    With several ranks, all must reach this: they take the one that rank 0 has found.

    :raises: see `open_source`.
    """
    if isinstance(step, str) and step != "best":
        raise UsageError(f"step={step!r}: give a number or 'best'; without a step it is the newest good one")
    if storage_options and not is_remote(on_disk(source)):
        raise ConfigError(f"storage_options ({', '.join(storage_options)}) are for a URL, and {source} is none")
    if not _several_ranks():
        return _find(source, step, storage_options)
    found: list[Source] = []

    def on_rank_0() -> tuple[str, Any]:
        found.append(_find(source, step, storage_options))
        inside = found[0].kind == "checkpoint"
        return (found[0].place, None) if inside else (str(source), step)  # a run's is inside

    place, number = from_rank_0(on_rank_0)
    return _on_all_ranks(
        lambda: found[0] if found else open_source(place, step=number, storage_options=storage_options)
    )


def _find(path: str | os.PathLike[str], step: Step, storage_options: Mapping[str, Any] | None) -> Source:
    """:raises NoGoodCheckpoint: also in place of `Damaged`, which is for what is found while tensors are read."""
    try:
        found = open_source(path, step=step, storage_options=storage_options)
    except Damaged as error:
        raise NoGoodCheckpoint(
            f"{path} has no good checkpoint: {error}; take another step, or bring the files back"
        ) from error
    for text in found.passed_over:
        warnings.warn(text, stacklevel=4)
    return found


class _Plan:
    """What is loaded.

    :ivar targets: the tensors to load into, by their names in the manifest.
    """

    def __init__(self, state: State, manifest: Manifest, chosen: Choice, differences: list[Difference]) -> None:
        self._state = state
        self._manifest = manifest
        self._chosen = chosen
        self._cast = {difference.name for difference in differences if difference.kind == "retyped"}
        self._left = {difference.name for difference in differences} - self._cast
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

    def read(self, found: Source, targets: Mapping[str, torch.Tensor]) -> int:
        with still_there(found.storage, found.folder):
            return load_tensors(found.storage, found.folder, self._manifest, targets, cast=self._cast)

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
        left_off = self._state.left_off(name)
        keys = [key for group in live["param_groups"] for key in group["params"]]
        known = {key for key in keys if self._left.isdisjoint((key, left_off + key))}
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
    return {key: value for key, value in group.items() if key not in PARAMETERS}


def _parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key in PARAMETERS}


def _names(tree: Mapping[str, Any]) -> set[str]:
    return set(flatten(tree))


def _decoded(manifest: Manifest, tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The saved tree, with something in the place of tensors that aren't given.

    :raises StateError: it has a tensor that was never saved.
    """
    nothing = torch.empty(0)

    def tensor(name: str) -> torch.Tensor:
        if name not in manifest.tensors:
            raise StateError(f"{name}: named in the checkpoint, but not saved with it; take another step or save anew")
        return (tensors or {}).get(name, nothing)

    tree: dict[str, Any] = decode(manifest.tree, tensor)
    return tree


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _on_all_ranks(work: Callable[[], T]) -> T:
    """Do something on every rank. :raises: on all of them, what the first has met of those that have met something."""
    if not _several_ranks():
        return work()
    outcome: list[T] = []
    problem: tuple[type[Exception], str] | None = None
    try:
        outcome.append(work())
    except (DtrainError, Damaged, OSError) as error:
        kind = OSError if isinstance(error, OSError) else type(error)  # some of those below it take more than a text
        problem = kind, f"rank {dist.get_rank()}: {error}"
    for found in filter(None, from_all_ranks(problem)):
        raise found[0](found[1])
    return outcome[0]
