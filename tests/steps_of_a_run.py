"""Checkpoints of a run whose whole state follows from the step's number, and ways to damage them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.format import MANIFEST, Manifest
from tests.saving import Kept, Saver, differences, folder_of, restore
from tests.world import in_world


def objects(step: int) -> dict[str, Any]:
    """The state of a run after so many steps, all of it made of the step's number."""
    torch.manual_seed(step)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "kept": Kept({"step": step, "text": "x" * 50})}


def contents(held: dict[str, Any]) -> list[Any]:
    return [dict(held["model"].state_dict()), held["optimizer"].state_dict(), held["kept"].value]


def make(root: Path, steps: list[int], ranks: int = 1, keep_last: int = 9) -> None:
    def work(rank: int) -> None:
        for step in steps:
            Saver(root, keep_last, **objects(step)).save(step)

    in_world(ranks, work)


def restored(root: Path) -> int | None:
    """The step that comes back; checked to hold what was saved at that step and nothing else."""
    held = objects(999)
    step = restore(root, **held)
    if step is not None:
        assert list(differences(contents(objects(step)), contents(held))) == []
    return step


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def spoil(root: Path, step: int) -> None:
    """Flip a bit of a weight, with the file's size unchanged."""
    folder = folder_of(root, step)
    chunk = Manifest.from_json((folder / MANIFEST).read_bytes()).tensors["model.weight"].chunks[0]
    flip(folder / chunk.file, chunk.offset + chunk.payload)
