"""What a module holds besides ordinary tensors: a version, extra state, and tensors that were expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.checkpoint.loading import load
from dtrain.errors import StateError
from tests.saving import bits, differences, restore, save
from tests.world import alone


class Versioned(nn.Module):
    """A module whose state had another form in its first version."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.extra: dict[str, Any] = {}

    def get_extra_state(self) -> dict[str, Any]:
        return self.extra

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 100
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


@pytest.mark.parametrize("before", [{"seen": 0, "mean": torch.zeros(2)}, {"mean": torch.zeros(0)}, {}])
def test_a_modules_version_and_extra_state_come_back(tmp_path: Path, before: dict[str, Any]) -> None:
    def work() -> None:
        one, other = Versioned(), Versioned()
        one.extra = {"seen": 7, "mean": torch.randn(2)}
        save(tmp_path, model=nn.Sequential(one))
        other.extra = before
        restore(tmp_path, model=nn.Sequential(other))
        assert bits(other.weight) == bits(one.weight), "the weight was taken for one of version 1"
        assert list(differences(one.extra, other.extra)) == []

    alone(work)


@pytest.mark.parametrize("had", [True, False])
def test_extra_state_that_only_the_checkpoint_or_only_the_model_has_is_named(tmp_path: Path, had: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

    before, now = (Versioned(), Plain()) if had else (Plain(), Versioned())
    allow: dict[str, Any] = {"allow_unexpected" if had else "allow_missing": "*_extra_state"}

    def work() -> None:
        save(tmp_path, model=nn.Sequential(before))
        with pytest.raises(StateError, match=rf"model\.0\._extra_state: {'in' if had else 'not in'} the checkpoint"):
            restore(tmp_path, model=nn.Sequential(now))
        assert bits(now.weight) != bits(before.weight)
        load(tmp_path, {"model": nn.Sequential(now)}, **allow)
        assert bits(now.weight) == bits(before.weight)

    alone(work)


@pytest.mark.parametrize("form", ["buffer", "parameter"])
def test_a_tensor_that_was_expanded_is_refused_before_it_is_saved_or_loaded(tmp_path: Path, form: str) -> None:
    def made(expanded: bool) -> nn.Module:
        model = nn.Linear(2, 2)
        scale = torch.ones(1).expand(5) if expanded else torch.zeros(5)
        model.register_buffer("scale", scale) if form == "buffer" else setattr(model, "scale", nn.Parameter(scale))
        return model

    def work() -> None:
        with pytest.raises(StateError, match=r"model\.scale: nothing can be loaded into an expanded tensor"):
            save(tmp_path, model=made(expanded=True))
        save(tmp_path, model=made(expanded=False))
        with pytest.raises(StateError, match=r"model\.scale: .*; keep its \.contiguous\(\) in the module"):
            load(tmp_path, {"model": made(expanded=True)})
        load(tmp_path, {"model": made(expanded=True)}, skip="model.scale")

    alone(work)
