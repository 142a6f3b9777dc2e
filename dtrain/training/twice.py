"""`Twice`: a step computed two times from the same state, which must come to the same bits."""

from __future__ import annotations

import socket
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dtrain.checkpoint.manager import from_all_ranks
from dtrain.checkpoint.plan import local_part
from dtrain.checkpoint.state import State
from dtrain.errors import Unreliable
from dtrain.training.copies import digest_of
from dtrain.training.parallel import Parallel


class Twice:
    """One rank's view of it. Made before the step, it remembers the state."""

    def __init__(self, state: State, parallel: Parallel) -> None:
        self._state = state
        self._parallel = parallel
        self._first = 0
        self._before = {name: _copied(state.state_of(name)) for name in state.objects}

    def back(self) -> None:
        """Remember what the step came to, and have the state before it again."""
        self._first = self._digest()
        self._state.load(self._before)
        self._before = {}

    def compare(self, step: int) -> None:
        """Compare what it has come to now. All ranks must reach it.

        :raises Unreliable: it is another result on some rank.
        """
        found = from_all_ranks(socket.gethostname() if self._digest() != self._first else "")
        named = [f"rank {rank} ({host})" for rank, host in enumerate(found) if host]
        if named:
            raise Unreliable(
                f"step {step} was computed twice after the restore, from the same state, and {', '.join(named)} came "
                "to another result the second time: the machine can't be trusted, or the model computes something "
                "that is not deterministic (see torch.use_deterministic_algorithms), or has state that isn't tracked"
            )

    def _digest(self) -> int:
        return digest_of(local_part(p) for model in self._parallel.models for p in model.module.parameters())


def _copied(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree)
