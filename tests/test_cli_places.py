"""What `dtrain checkpoint` and `load` read by a URL, and how they are told the way there."""

from __future__ import annotations

import io
import json
import sys
import uuid
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dtrain.checkpoint import Reader
from dtrain.checkpoint.loading import load
from dtrain.checkpoint.sources import open_source
from dtrain.cli.demo import Demo
from dtrain.cli.main import main
from dtrain.errors import ConfigError, StateError
from dtrain.storage.places import storage_at
from tests.s3_server import BUCKET, Server

pytestmark = pytest.mark.own_process


def dtrain(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output, errors of `dtrain checkpoint ...`, in this process, which is the test's own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
        main(["checkpoint", *map(str, arguments)])
    assert isinstance(exit.value.code, int)
    return exit.value.code, out.getvalue(), err.getvalue()


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"weight": torch.randn(5, 3), "bias": torch.randn(5).bfloat16()}


def test_storage_options_lead_the_commands_to_a_server_that_the_environment_does_not_name(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    url, options = f"s3://{BUCKET}/{uuid.uuid4().hex}", {"endpoint_url": s3.url}
    way = ("--storage-option", f"endpoint_url={s3.url}", "--storage-option", "path_style=true")
    save_file(weights(), tmp_path / "model.safetensors")
    assert dtrain("import", tmp_path / "model.safetensors", url, *way)[0] == 0
    for arguments in (("ls",), ("show",), ("verify",), ("gc",)):
        code, _, err = dtrain(*arguments, url, *way)
        assert (arguments, code, err) == (arguments, 0, "")
    assert dtrain("diff", url, 0, 0, *way)[0] == 0
    assert dtrain("export", url, tmp_path / "out.safetensors", *way)[0] == 0
    assert (tmp_path / "out.safetensors").exists()
    model = nn.Linear(3, 5)
    model.bias.data = model.bias.data.bfloat16()
    load(url, {"model": model}, storage_options=options)
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in model.state_dict().items())
    assert Reader.open(url, storage_options=options).read_metadata().state_dict_metadata.keys() > {"model.weight"}


def test_an_option_for_no_url_and_one_without_a_value_are_named(tmp_path: Path) -> None:
    code, _, err = dtrain("ls", tmp_path, "--storage-option", "region=x")
    assert (code, err) == (
        2,
        f"dtrain: error: --storage-option region=x is for a URL, and {tmp_path} is none; leave it out\n",
    )
    code, _, err = dtrain("ls", "s3://bucket/run", "--storage-option", "region")
    assert (code, err) == (
        2,
        "dtrain: error: --storage-option region: give NAME=VALUE, such as endpoint_url=http://host:9000\n",
    )


def test_safetensors_are_imported_and_loaded_from_a_bucket(s3: Server, tmp_path: Path) -> None:
    folder = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    storage = storage_at(folder)
    index = {"weight_map": {"weight": "a.safetensors", "bias": "b.safetensors"}}
    for file, name in (("a.safetensors", "weight"), ("b.safetensors", "bias")):
        save_file({name: weights()[name]}, tmp_path / file)
        storage.create(file, (tmp_path / file).read_bytes())
    with pytest.raises(ConfigError, match="has several files of safetensors; name one of them"):
        open_source(folder)
    storage.create("model.safetensors.index.json", json.dumps(index).encode())
    for source in (folder, f"{folder}/model.safetensors.index.json"):
        model = nn.Linear(3, 5)
        model.bias.data = model.bias.data.bfloat16()
        assert load(source, {"model": model}).tensors == ("model.weight", "model.bias")
        assert all(torch.equal(tensor, weights()[name]) for name, tensor in model.state_dict().items())
    code, out, _ = dtrain("import", f"{folder}/a.safetensors", tmp_path / "run", "--json")
    assert (code, json.loads(out)["bytes"]) == (0, 60)
    assert dtrain("verify", tmp_path / "run")[0] == 0
    with pytest.raises(StateError, match=r"none.safetensors: the file none.safetensors is missing"):
        open_source(f"{folder}/none.safetensors")
    with pytest.raises(ConfigError, match=r"is no run, no checkpoint and no safetensors, .*; copy other weights to a"):
        open_source(f"{folder}/weights.pt")


def test_a_demo_on_s3_names_the_package_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dtrain.cli.s3_server", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"^--s3 needs boto3: pip install 'dtrain\[demo\]'$"):
        Demo(s3=True)._server(tmp_path).__enter__()


def test_what_is_on_the_web_or_has_options_that_it_needs_none_of_is_refused_with_a_remedy(tmp_path: Path) -> None:
    url = "https://host/model.safetensors"
    code, _, err = dtrain("import", url, tmp_path / "run")
    assert (code, err) == (
        2,
        f"dtrain: error: {url}: of the web dtrain reads nothing; copy the files to a disk and name them there\n",
    )
    with pytest.raises(ConfigError, match="of the web dtrain reads nothing"):
        load(url, {"model": nn.Linear(3, 5)})
    with pytest.raises(ConfigError, match=r"storage_options \(region\) are for a URL, and run is none"):
        load("run", {"model": nn.Linear(3, 5)}, storage_options={"region": "x"})


def test_import_names_what_it_leaves_out(tmp_path: Path) -> None:
    saved = {"state": {"net": weights(), "ema": weights()}, "optimizer": {"lr": 0.1, "w": torch.ones(2)}, "epoch": 3}
    torch.save(saved, tmp_path / "all.ckpt")
    code, out, _ = dtrain("import", tmp_path / "all.ckpt", tmp_path / "run", "--key", "state.net")
    assert code == 0
    assert out.splitlines()[1] == "left out, as it isn't in state.net: epoch, optimizer, state.ema"
    code, out, _ = dtrain("import", tmp_path / "all.ckpt", tmp_path / "again", "--key", "state.net", "--json")
    assert (code, json.loads(out)["left_out"]) == (0, ["epoch", "optimizer", "state.ema"])
    save_file(weights(), tmp_path / "model.safetensors")
    assert len(dtrain("import", tmp_path / "model.safetensors", tmp_path / "third")[1].splitlines()) == 1


def test_large_weights_come_into_a_bucket_as_they_are(s3: Server, tmp_path: Path) -> None:
    """Below a folder that is called as the checkpoints of a run are."""
    torch.manual_seed(2)
    large = {"weight": torch.randn(2 << 20, 3), "bias": torch.randn(2 << 20)}
    save_file(large, tmp_path / "model.safetensors")
    url = f"s3://{BUCKET}/checkpoints/{uuid.uuid4().hex}"
    assert dtrain("import", tmp_path / "model.safetensors", url)[0] == 0
    assert dtrain("verify", url)[0] == 0
    assert dtrain("export", url, tmp_path / "out.safetensors")[0] == 0
    attempt = json.loads(dtrain("ls", url, "--json")[1])[0]["attempt"]
    for place in (f"{url}/checkpoints/{attempt}", f"{url}/out.safetensors"):
        with pytest.raises(ConfigError, match="step=3 can be asked of a run folder only"):
            load(place, {"model": nn.Linear(3, 2 << 20)}, step=3)
    model = nn.Linear(3, 2 << 20)
    for source in (url, tmp_path / "out.safetensors"):
        load(source, {"model": model})
        assert all(torch.equal(tensor, large[name]) for name, tensor in model.state_dict().items())
