"""The checkpoint engine, also for loops that dtrain doesn't run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.checkpoint.loading import Loaded, load
    from dtrain.checkpoint.reader import Reader
    from dtrain.checkpoint.writer import Writer

__all__ = ["Loaded", "Reader", "Writer", "load"]

_HOMES = {"Loaded": "loading", "Reader": "reader", "Writer": "writer", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Imports torch's checkpoints only when somebody asks for what needs them: most of dtrain's commands don't."""
    if name in _HOMES:
        return getattr(import_module(f"dtrain.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
