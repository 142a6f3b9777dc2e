"""Stock torch opens what dtrain saved; dtrain itself opens no pickle, whatever lies in the folder."""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dtrain.checkpoint.format import MANIFEST, METADATA, digest, hash_item
from dtrain.checkpoint.log import Entry
from tests.saving import Kept, Saver, bad, differences, folder_of, log_of, restore, save
from tests.world import alone, in_world

VALUES: dict[str, Any] = {
    "epoch": 3,
    "names": ["a", "b"],
    "best": {"loss": 0.5, "at": (1, 2)},
    "log": [{"a": 1}, [2, {"b": 3}]],
    "mean": torch.ones(3),
}


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    groups: list[dict[str, Any]] = [
        {"params": [*model[0].parameters()]},
        {"params": [*model[1].parameters(), *model[2].parameters()], "lr": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_all(root: Path, seed: int = 1) -> None:
    model, optimizer = trained(seed)
    save(root, 5, model=model, optimizer=optimizer, kept=Kept(VALUES))


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("readers", [1, 2])
def test_stock_dcp_load_opens_a_checkpoint_and_gets_equal_bits(tmp_path: Path, writers: int, readers: int) -> None:
    in_world(writers, lambda rank: save_all(tmp_path))
    folder = folder_of(tmp_path, 5)

    def load(rank: int) -> list[str]:
        model, optimizer = trained(1)
        expected = {"model": dict(model.state_dict()), "optimizer": get_optimizer_state_dict(model, optimizer)}
        other, its = trained(2)
        found: dict[str, Any] = {
            "model": dict(other.state_dict()),
            "optimizer": get_optimizer_state_dict(other, its),
            "kept": {
                "epoch": 0,
                "names": [],
                "best": {"loss": 0.0, "at": ()},
                "log": [{"a": 0}, [0, {"b": 0}]],
                "mean": torch.zeros(3),
            },
        }
        dcp.load(found, checkpoint_id=str(folder))
        set_optimizer_state_dict(other, its, found["optimizer"])
        assert list(differences(optimizer.state_dict(), its.state_dict())) == []
        return list(differences(expected | {"kept": VALUES}, found))

    assert in_world(readers, load) == [[]] * readers


def test_stock_torch_makes_one_file_of_a_checkpoint_with_the_whole_tree(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    alone(lambda: save_all(tmp_path / "run"))
    alone(lambda: dcp_to_torch_save(folder_of(tmp_path / "run", 5), tmp_path / "one.pt"))
    found = torch.load(tmp_path / "one.pt", weights_only=False)
    assert list(differences(dict(trained(1)[0].state_dict()), found["model"])) == []
    assert found["kept"]["best"] == VALUES["best"]
    assert found["dtrain"]["step"] == 5


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _plant_in_metadata(folder: Path, code: bytes) -> None:
    (folder / METADATA).write_bytes(code)


def _plant_in_values(folder: Path, code: bytes) -> None:
    """Overwrites the pickle inside of every value that stock DCP would unpickle, padded to the old length."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    planted = 0
    for file, offset, length in _values(manifest):
        path = folder / file
        data = bytearray(path.read_bytes())
        frame = slice(offset, offset + length)
        if (at := data.find(b"\x80\x02", frame.start, frame.stop)) >= 0 and at + len(code) < frame.stop:
            data[at : at + len(code)] = code
            planted += 1
        path.write_bytes(data)
    assert planted


def _values(manifest: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """File, offset and length of the copies that are there for stock DCP."""
    for file, part in manifest["files"].items():
        yield from ((file, item[1], item[2]) for item in part["items"] if len(item) == 3)


def _adjust(root: Path) -> None:
    """Makes all digests right again, as somebody with the key to the folder could."""
    folder = folder_of(root, 5)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    index = (folder / METADATA).read_bytes()
    manifest["metadata"] = [len(index), digest(index)]
    for file, part in manifest["files"].items():
        held = memoryview((folder / file).read_bytes())
        digests = b"".join(hash_item(held[item[1] : item[1] + item[2]]) for item in part["items"])
        part |= {"size": held.nbytes, "digests": base64.b64encode(digests).decode()}
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)

    def commit() -> None:
        saver = Saver(root)
        saver.catalog.log.append(
            Entry(
                kind="commit", epoch=saver.manager.epoch, time=0.0, step=5, attempt=folder.name, manifest=digest(data)
            )
        )

    alone(commit)


def restored(root: Path) -> tuple[int | None, list[str]]:
    model, optimizer = trained(2)
    kept = Kept()
    step = restore(root, model=model, optimizer=optimizer, kept=kept)
    expected, its = trained(1)
    before = [dict(expected.state_dict()), its.state_dict(), VALUES]
    return step, list(differences(before, [dict(model.state_dict()), optimizer.state_dict(), kept.value]))


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("plant", [_plant_in_metadata, _plant_in_values])
def test_a_planted_pickle_never_runs(tmp_path: Path, plant: Callable[[Path, bytes], None], adjusted: bool) -> None:
    root, trap = tmp_path / "run", tmp_path / "trap"
    alone(lambda: save_all(root, seed=1))
    folder = folder_of(root, 5)
    size = (folder / METADATA).stat().st_size
    code = pickle.dumps(Malicious(trap), protocol=2)
    pickle.loads(code)
    assert trap.is_dir(), "the trap works"
    trap.rmdir()
    plant(folder, code.ljust(size, b"\0") if plant is _plant_in_metadata else code)
    if adjusted:
        _adjust(root)
    assert alone(lambda: restored(root)) == (5, [])
    assert not trap.exists()
    assert bad(root) == []


def test_a_restore_unpickles_nothing_but_the_messages_of_its_own_group(tmp_path: Path) -> None:
    alone(lambda: save_all(tmp_path))

    def lookups(work: Callable[[], object]) -> list[str]:
        found: list[str] = []

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and str(args[0]).endswith(METADATA):
                found.append(f"opened {args[0]}")
            if event == "pickle.find_class":
                frame = sys._getframe(1)
                callers = [frame.f_code.co_name]
                while frame.f_back is not None:
                    frame = frame.f_back
                    callers.append(frame.f_code.co_name)
                # The one that makes objects of what other ranks have sent must be the one that unpickles.
                if "_tensor_to_object" not in callers[:4]:
                    found.append(f"{args[1:]} in {callers[:6]}")

        sys.addaudithook(hook)
        work()
        return found

    assert alone(lambda: lookups(lambda: restored(tmp_path))) == []
    found = {"model": dict(trained(2)[0].state_dict()), "kept": {"epoch": 0}}
    assert len(alone(lambda: lookups(lambda: dcp.load(found, checkpoint_id=str(folder_of(tmp_path, 5)))))) > 5


def test_the_log_names_every_file_of_a_checkpoint_in_its_manifest(tmp_path: Path) -> None:
    in_world(2, lambda rank: save_all(tmp_path))
    folder = folder_of(tmp_path, 5)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    sizes = {file: part["size"] for file, part in manifest["files"].items()}
    index = (folder / METADATA).read_bytes()
    assert manifest["metadata"] == [len(index), digest(index)]
    assert sizes == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name not in (MANIFEST, METADATA)
    }
    assert log_of(tmp_path).commits()[0].manifest == digest((folder / MANIFEST).read_bytes())
