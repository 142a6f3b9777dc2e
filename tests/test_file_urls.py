"""Folders of this machine that are named by a URL: they are the same as by their paths, and as durable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import dtrain as package
from dtrain.checkpoint import Reader, load
from dtrain.checkpoint.sources import open_source
from dtrain.errors import ConfigError
from dtrain.storage.local import LocalStorage
from dtrain.storage.places import storage_at
from tests import checkpoint_command
from tests.checkpoint_command import Dtrain
from tests.steps_of_a_run import make, objects
from tests.world import alone

dtrain = checkpoint_command.dtrain


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}"])
def test_a_run_by_its_url_is_that_of_the_path(tmp_path: Path, form: str) -> None:
    folder = str(tmp_path / "my runs" / "x")
    url = form.format(folder.replace(" ", "%20"))
    config = package.Config(dir=url, global_batch=2, micro_batch=1)
    assert (config.dir, config.local_dir) == (folder, folder)
    for storage in (config.storage(), storage_at(url)):
        assert isinstance(storage, LocalStorage), "which commits by a link, and syncs"
        assert storage.root == folder


def test_a_url_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="dir='file://data/run' must be like file:///data/run"):
        storage_at("file://data/run")
    with pytest.raises(ConfigError, match="must be like file:///data/run"):
        package.Config(dir="file://data/run", global_batch=2, micro_batch=1)


def test_what_is_loaded_may_be_named_by_a_url(tmp_path: Path, dtrain: Dtrain) -> None:
    make(tmp_path / "run", [10, 20])
    (newest,) = (tmp_path / "run/checkpoints").glob("step-00000020*")
    dtrain("export", tmp_path / "run", tmp_path / "weights.safetensors")
    dtrain("export", tmp_path / "run", tmp_path / "weights.pt")
    for path in (tmp_path / "run", newest, tmp_path / "weights.safetensors", tmp_path / "weights.pt"):
        model = nn.Linear(5, 3)
        load(path.as_uri(), {"model": model})
        assert isinstance(open_source(path.as_uri()).storage, LocalStorage)
        assert torch.equal(model.weight, objects(20)["model"].weight), path
        found = {"model": nn.Linear(5, 3).state_dict()}
        dcp.load(found, storage_reader=Reader.open(path.as_uri()), no_dist=True)
        assert torch.equal(found["model"]["weight"], model.weight), path
    with pytest.raises(ConfigError, match="are for a URL"):
        load((tmp_path / "run").as_uri(), {"model": nn.Linear(5, 3)}, storage_options={"region": "x"})


def test_the_commands_take_urls(tmp_path: Path, dtrain: Dtrain) -> None:
    make(tmp_path / "run", [10, 20])
    run, state = (tmp_path / "run").as_uri(), {"model": nn.Linear(5, 3).state_dict()}
    for command in ("ls", "show", "gc"):
        assert dtrain(command, run, "--json") == dtrain(command, tmp_path / "run", "--json")
    assert dtrain("verify", run, "--all")[0] == 0
    assert dtrain("diff", run, 10, 20)[0] == 1
    alone(lambda: dcp.save(state, checkpoint_id=tmp_path / "stock"))
    torch.save(state, tmp_path / "weights.pt")
    for number, name in enumerate(("run", "stock", "weights.pt")):
        to = tmp_path / f"imported {number}"
        assert dtrain("import", (tmp_path / name).as_uri(), to.as_uri())[0] == 0
        assert dtrain("export", to.as_uri(), (tmp_path / f"{number}.pt").as_uri())[0] == 0
        assert list(torch.load(tmp_path / f"{number}.pt", weights_only=True)) == ["weight", "bias"]
    (tmp_path / "empty/log").mkdir(parents=True)
    assert dtrain("ls", (tmp_path / "empty").as_uri())[0] == 0
    code, _, err = dtrain("ls", run, "--storage-option", "region=x")
    assert (code, "is for a URL" in err) == (2, True)
    assert not any("file:" in name for name in os.listdir())
