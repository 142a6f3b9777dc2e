"""What a checkpoint looked like when manifests were of version 1: every later dtrain reads it to the same bits.

`tests/frozen` is a run folder of two ranks that saved `VALUES` and `tensors` at step 7, under the name `kept`, with
torch 2.13. It is never made anew: what doesn't read it any more has broken somebody's run.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dtrain.checkpoint.format import MANIFEST, Manifest
from dtrain.checkpoint.interchange import export_weights
from dtrain.checkpoint.sources import open_source
from dtrain.checkpoint.verify import verify, verify_log
from dtrain.errors import StateError
from tests.saving import Kept, bits, differences, folder_of, log_of, restore
from tests.world import in_world

FROZEN = Path(__file__).parent / "frozen"
VALUES: dict[Any, Any] = {"epoch": 3, "best": {"loss": math.inf, "at": (1, 2)}, 5: b"\x00\xff", "where": None}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "cut": torch.arange(12, dtype=torch.float32).reshape(4, 3) / 3,
        "half": torch.tensor([1.5, -0.0, math.nan], dtype=torch.bfloat16),
        "count": torch.tensor(2**53 + 1),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy, since a restore claims the run."""
    shutil.copytree(FROZEN, tmp_path / "run", ignore=shutil.ignore_patterns(".gitattributes"))
    return tmp_path / "run"


def test_the_frozen_manifest_is_of_version_1_and_has_the_keys_of_then() -> None:
    manifest = json.loads((folder_of(FROZEN, 7) / MANIFEST).read_bytes())
    assert manifest["version"] == 1
    assert list(manifest) == [
        "version", "torch", "block_bytes", "step", "world_size", "metadata", "tree", "tensors", "files",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in FROZEN.rglob("*") if path.is_file()) < 32_000


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_frozen_checkpoint_is_restored_to_its_bits(run: Path, world: int) -> None:
    def restored(rank: int) -> tuple[int | None, list[str]]:
        kept = Kept()
        step = restore(run, kept=kept)
        return step, list(differences(VALUES | {"tensors": tensors()}, kept.value))

    assert in_world(world, restored) == [(7, [])] * world


def test_the_frozen_checkpoint_is_verified_exported_and_opened_by_stock_dcp(run: Path, tmp_path: Path) -> None:
    log = log_of(run)
    assert verify_log(log._storage, log) == []
    assert verify(log._storage, log, log.commits()[0]).faults == []
    export_weights(open_source(run), tmp_path / "out.pt", name="kept")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(differences(VALUES | {"tensors": tensors()}, found)) == []
    found = {"kept": {"tensors": {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}}}
    dcp.load(found, checkpoint_id=folder_of(run, 7), no_dist=True)
    assert list(differences(tensors(), found["kept"]["tensors"])) == []
    assert bits(found["kept"]["tensors"]["count"]) == (2**53 + 1).to_bytes(8, "little")


def test_a_manifest_of_a_later_version_says_what_to_install() -> None:
    manifest = json.loads((folder_of(FROZEN, 7) / MANIFEST).read_bytes())
    with pytest.raises(StateError, match="is of version 2, written by a newer dtrain; this one knows versions up to 1"):
        Manifest.from_json(json.dumps(manifest | {"version": 2}).encode())
