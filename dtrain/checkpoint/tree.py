"""The state that is saved: a tree of dicts, lists and plain values, with tensors at some leaves; and its form as JSON.

A tensor becomes a reference to its item in the manifest, everything else a JSON value that comes back equal; so nothing
is ever unpickled on the way back.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from dtrain.errors import Damaged, StateError

Tree = Any
"""Nested dicts, lists and tuples of plain values and tensors."""

_TWICE = "two values in the state are called {!r}; rename one of them"


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def dtype_named(name: str) -> torch.dtype:
    """:raises StateError: this torch has no such type."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"tensor type {name!r} is unknown to torch {torch.__version__}; install the one that saved it")
    return dtype


def flatten(tree: Tree) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    """The leaves of a tree by dotted name, each with its path; a list of plain values is one leaf.

    These are the names that DCP gives to the same tree (`torch.distributed.checkpoint._traverse`), but that DCP would
    pickle a tuple with its tensors in it.

    :raises StateError: two leaves have the same name.
    """
    leaves: dict[str, tuple[tuple[str | int, ...], Any]] = {}

    def visit(name: str, path: tuple[str | int, ...], value: Any) -> None:
        at = f"{name}." if path else ""
        if isinstance(value, torch.Tensor):  # first, since most leaves are
            leaf(name, path, value)
        elif isinstance(value, dict | Mapping):
            for key, inner in value.items():
                visit(f"{at}{key}", (*path, str(key)), inner)
        elif _is_branch(value):
            for index, inner in enumerate(value):
                visit(f"{at}{index}", (*path, index), inner)
        else:
            leaf(name, path, value)

    def leaf(name: str, path: tuple[str | int, ...], value: Any) -> None:
        if name in leaves:
            raise StateError(_TWICE.format(name))
        leaves[name] = (path, value)

    visit("", (), tree)
    return leaves


def _is_branch(value: Any) -> bool:
    if isinstance(value, list) and any(
        isinstance(v, Mapping) or (isinstance(v, list) and _is_branch(v)) for v in value
    ):
        return True
    return isinstance(value, list | tuple) and _holds_tensor(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)


def encode(tree: Tree, path: str | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """A tree as JSON. What JSON has no form for becomes an object with one key that begins with `$`.

    :param path: the tree's own name, if it is a part of another one.
    :param tensors: takes the tree's tensors, by the names that `flatten` gives them.
    :raises StateError: it holds something that could come back only by unpickling.
    """
    at = "" if path is None else f"{path}."
    path = path or ""
    match tree:  # what there is the most of comes first
        case torch.Tensor():
            if tree.layout != torch.strided or tree.is_meta or tree.is_quantized:
                kind = "meta" if tree.is_meta else "quantized" if tree.is_quantized else dtype_name(tree.layout)
                raise StateError(f"{path}: a {kind} tensor can't be saved; let state_dict() return a plain one")
            if tensors is not None and tensors.setdefault(path, tree) is not tree:
                raise StateError(_TWICE.format(path))
            return {"$tensor": path}
        case dict() | Mapping():
            for key in tree:
                if not isinstance(key, str) or key.startswith("$"):
                    items = tree.items()
                    return {"$items": [[_hashed(key, path), encode(v, f"{at}{key}", tensors)] for key, v in items]}
            return {key: encode(value, f"{at}{key}", tensors) for key, value in tree.items()}
        case None | bool() | str():
            return tree
        case np.generic() | np.ndarray():
            array = np.asarray(tree)
            if array.dtype.hasobject or array.dtype.names or isinstance(tree, np.ma.MaskedArray):
                raise StateError(
                    f"{path}: a numpy array of {array.dtype} can't be saved; make it a plain one of numbers"
                )
            data = base64.b64encode(array.tobytes()).decode()
            return {"$numpy": [array.dtype.str, None if isinstance(tree, np.generic) else array.shape, data]}
        case int() | float() if type(tree) in (int, float):
            return tree if type(tree) is int or math.isfinite(tree) else {"$float": repr(tree)}
        case bytes():
            return {"$bytes": base64.b64encode(tree).decode()}
        case torch.dtype():
            return {"$dtype": dtype_name(tree)}
        case torch.device():
            return {"$device": str(tree)}
        case torch.Size() | tuple():
            kind = "$size" if isinstance(tree, torch.Size) else "$tuple"
            return {kind: [encode(value, f"{at}{i}", tensors) for i, value in enumerate(tree)]}
        case list():
            return [encode(value, f"{at}{i}", tensors) for i, value in enumerate(tree)]
        case set() | frozenset():
            kind = "$set" if isinstance(tree, set) else "$frozenset"
            return {kind: sorted((_hashed(value, path) for value in tree), key=repr)}
    raise StateError(
        f"{path}: a {type(tree).__qualname__} can't be saved without pickle; let state_dict() return numbers, "
        "texts, tensors, and lists, tuples and dicts of them"
    )


def _hashed(value: Any, path: str) -> Any:
    """A dict's key or a set's element: a tensor there has no name that it could be found by."""
    if isinstance(value, torch.Tensor) or _holds_tensor(value):
        raise StateError(f"{path}: a tensor in a set, or as a key, can't be saved; keep it in a list or as a value")
    return encode(value, path)


def is_expanded(leaf: object) -> bool:
    """Whether several of a tensor's elements are one in memory, so that nothing can be loaded into it."""
    if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or 0 not in (strides := leaf.stride()):
        return False
    return any(size > 1 for size, stride in zip(leaf.shape, strides, strict=True) if not stride)


def decode(value: Any, tensor: Callable[[str], torch.Tensor]) -> Tree:
    """The tree that was encoded; `tensor` gives the tensor of each reference.

    :raises Damaged: it isn't the outcome of `encode`.
    """

    def inner(value: Any) -> Tree:
        return decode(value, tensor)

    if isinstance(value, list):
        return [inner(v) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": str(key)}:
            return tensor(key)
        case {"$numpy": [str(dtype), shape, str(data)]}:
            array = np.frombuffer(base64.b64decode(data), dtype=dtype).copy()
            return array[0] if shape is None else array.reshape(shape)
        case {"$float": str(text)}:
            return float(text)
        case {"$bytes": str(data)}:
            return base64.b64decode(data)
        case {"$dtype": str(name)}:
            return dtype_named(name)
        case {"$device": str(name)}:
            return torch.device(name)
        case {"$size": list(items)}:
            return torch.Size(inner(v) for v in items)
        case {"$tuple": list(items)}:
            return tuple(inner(v) for v in items)
        case {"$set": list(items)}:
            return {inner(v) for v in items}
        case {"$frozenset": list(items)}:
            return frozenset(inner(v) for v in items)
        case {"$items": list(items)}:
            return {inner(k): inner(v) for k, v in items}
    if any(key.startswith("$") for key in value):
        raise Damaged(f"unknown value {next(iter(value))!r} in the manifest")
    return {key: inner(v) for key, v in value.items()}


def leaves_of(value: Any) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    """The leaves of a tree that was encoded, as `flatten` gives them, with an empty tensor in the place of each."""
    nothing = torch.empty(0, device="meta")
    return flatten(decode(value, lambda _: nothing))


def is_tensor(value: Tree) -> bool:
    """Whether it stands for a tensor."""
    return isinstance(value, dict) and isinstance(value.get("$tensor"), str)


def tensor_names(tree: Tree) -> Iterator[str]:
    """The names of the tensors in a tree, in its order."""
    if is_tensor(tree):
        yield tree["$tensor"]
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensor_names(value)


def renamed(tree: Tree, old: str, new: str) -> Tree:
    """A tree in which the tensors' names begin with `new` instead of `old`."""
    if isinstance(tree, list):
        return [renamed(value, old, new) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if is_tensor(tree):
        return {"$tensor": new + tree["$tensor"].removeprefix(old)}
    return {key: renamed(value, old, new) for key, value in tree.items()}
