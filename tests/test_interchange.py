"""Weights leave a checkpoint in the forms of others, and come in from them: with equal bits, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dtrain.checkpoint.adopt import adopt
from dtrain.checkpoint.format import MANIFEST, METADATA
from dtrain.checkpoint.interchange import export_weights
from dtrain.checkpoint.loading import load
from dtrain.checkpoint.sources import open_source
from dtrain.elastic.process import fork
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError
from tests.saving import Kept, bits, differences, folder_of, restore, save
from tests.world import alone, in_world


class Odd(nn.Module):
    """Tensors of several types and shapes: a scalar, an empty one, one that isn't stored row by row, a shared one."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(3)
        self.halved = nn.Parameter(torch.randn(5).bfloat16())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("small", torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.tensor([True, False]))


def state(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(Odd(seed).state_dict())


def unlike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors differ, whatever their order."""
    return list(differences(dict(sorted(expected.items())), dict(sorted(found.items()))))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    in_world(2, lambda rank: save(folder, 7, model=Odd(), kept=Kept({"n": 3, "mean": torch.ones(2)})))
    return folder


def test_an_export_to_one_file_of_safetensors_has_equal_bits_and_no_prefix(run: Path, tmp_path: Path) -> None:
    done = export_weights(open_source(run), tmp_path / "out.safetensors")
    assert unlike(load_file(tmp_path / "out.safetensors"), state()) == []
    assert (done.tensors, done.left_out) == (len(state()), [])
    assert done.bytes == sum(tensor.nbytes for tensor in state().values())


def test_an_export_to_a_folder_is_cut_at_the_size_and_has_the_index_of_hugging_face(run: Path, tmp_path: Path) -> None:
    export_weights(open_source(run), tmp_path / "out", shard_bytes=300)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*files, "model.safetensors.index.json"]
    assert list(index["weight_map"]) == list(state()), "in the order of the model"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state().values())
    found: dict[str, torch.Tensor] = {}
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 300
        assert all(index["weight_map"][key] == file for key in held)
        found |= held
    assert unlike(found, state()) == []


def test_a_small_model_in_a_folder_is_one_file_without_an_index(run: Path, tmp_path: Path) -> None:
    export_weights(open_source(run), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("mapped", [False, True])
def test_an_export_for_torch_load_has_equal_bits_and_loads_into_the_model(
    run: Path, tmp_path: Path, mapped: bool
) -> None:
    export_weights(open_source(run), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mapped)
    assert list(differences(state(), found)) == []
    other = Odd(2)
    other.load_state_dict(found)
    assert list(differences(state(), dict(other.state_dict()))) == []


def test_an_export_of_all_has_the_whole_tree(run: Path, tmp_path: Path) -> None:
    source = open_source(run)
    export_weights(source, tmp_path / "all.pt", name=None)
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert list(found) == ["dtrain", "model", "kept"]
    assert list(differences({"n": 3, "mean": torch.ones(2)}, found["kept"])) == []
    done = export_weights(source, tmp_path / "all.safetensors", name=None)
    assert done.left_out == ["dtrain.step", "kept.n"]
    expected = {f"model.{key}": tensor for key, tensor in state().items()} | {"kept.mean": torch.ones(2)}
    assert unlike(load_file(tmp_path / "all.safetensors"), expected) == []


def test_numpy_values_become_what_weights_only_can_read(tmp_path: Path) -> None:
    value = {"a": np.arange(3), "b": np.float32(0.5), "c": (1, {"d": np.ones((2, 0))}), "e": torch.ones(2), "f": {1}}
    value |= {"g": {np.int64(2)}, "h": {np.int64(3): 4}}
    alone(lambda: save(tmp_path / "run", kept=Kept(value)))
    done = export_weights(open_source(tmp_path / "run"), tmp_path / "out.pt", name="kept")
    assert done.converted == ["a", "b", "c.1.d", "g", "h.3"]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = {
        "a": torch.arange(3),
        "b": 0.5,
        "c": (1, {"d": torch.ones(2, 0, dtype=torch.float64)}),
        "e": torch.ones(2),
        "f": {1},
        "g": {2},
        "h": {3: 4},
    }
    assert list(differences(expected, found)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.datetime64("2020-01-01"), r"a: a numpy datetime64\[D\] can't be read with weights_only=True"),
        (np.longdouble(1), r"a: a numpy (float|longdouble)\d* can't be read with weights_only=True"),
        ({frozenset({1}): 2}, r"a\.frozenset.*: a frozenset can't be read with weights_only=True"),
        ({(1, frozenset({1}))}, r"a\.1: a frozenset can't be read with weights_only=True"),
        (np.arange(3, dtype=">f4"), r"a: torch has no type for a numpy array of >f4"),
    ],
)
def test_what_weights_only_can_not_read_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    alone(lambda: save(tmp_path / "run", kept=Kept({"a": value, "w": torch.ones(2)})))
    with pytest.raises(StateError, match=message):
        export_weights(open_source(tmp_path / "run"), tmp_path / "out.pt", name="kept")


def _tensor(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(int(torch.Size(shape).numel()), dtype=torch.int64).reshape(shape)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_tensor_that_ranks_have_cut_comes_out_whole(tmp_path: Path, dim: int, suffix: str) -> None:
    whole = _tensor((3, 5, 7))

    def saved(rank: int) -> None:
        mesh = dist.init_device_mesh("cpu", (3,))
        tensor: DTensor = distribute_tensor(whole, mesh, [Shard(dim)])
        save(tmp_path / "run", kept=Kept({"w": tensor}))

    in_world(3, saved)
    source = open_source(tmp_path / "run")
    assert len(source.manifest.tensors["kept.w"].chunks) == 3
    out = tmp_path / f"out{suffix}"
    export_weights(source, out, name="kept")
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert list(differences({"w": whole}, found)) == []
    adopt(source, tmp_path / "new", key="kept")
    export_weights(open_source(tmp_path / "new"), out, force=True)
    found = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert list(differences({"w": whole}, found)) == []


def test_memory_stays_small_however_large_a_tensor_is(tmp_path: Path) -> None:
    alone(lambda: save(tmp_path / "run", model=nn.Linear(8192, 4096)))  # 134 MB

    def grown(work: Callable[[Path, Path], object], path: Path, to: str) -> int:
        """By how much the most memory that this takes exceeds what is taken before."""
        work(tmp_path / "small.safetensors", tmp_path / f"first {to}")  # so that all is imported
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        before = _status("VmRSS")
        work(path, tmp_path / to)
        return _status("VmHWM") - before

    def exported(path: Path, to: Path) -> object:
        return export_weights(open_source(path), to)

    def adopted(path: Path, to: Path) -> object:
        return adopt(open_source(path), to)

    save_file({"w": torch.ones(2)}, tmp_path / "small.safetensors")
    assert alone(lambda: grown(exported, tmp_path / "run", "out.safetensors")) < 16_000_000
    assert alone(lambda: grown(exported, tmp_path / "run", "out.pt")) < 16_000_000
    assert alone(lambda: grown(adopted, tmp_path / "out.safetensors", "adopted")) < 16_000_000
    assert alone(lambda: grown(adopted, tmp_path / "run", "copied")) < 16_000_000


def _status(field: str) -> int:
    """Of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(run: Path, tmp_path: Path, name: str) -> None:
    source = open_source(run)
    chunk = source.manifest.tensors["model.first.weight"].chunks[0]
    path = folder_of(run, 7) / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.payload] ^= 1
    path.write_bytes(data)
    place = f"{path}: bytes {chunk.offset} to {chunk.offset + chunk.length} are not those that were saved"
    with pytest.raises(Damaged, match=rf"{place} \(model\.first\.weight\)$"):
        export_weights(source, tmp_path / "to" / name)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_a_kill_in_the_middle_leaves_nothing_that_looks_whole(run: Path, tmp_path: Path, name: str) -> None:
    source = open_source(run)
    (tmp_path / "to").mkdir()

    def work() -> int:
        export_weights(source, tmp_path / "to" / name, progress=lambda done: os.kill(os.getpid(), signal.SIGKILL))
        return 0

    child = fork(work)
    assert os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT) is not None
    child.kill()
    left = [path.name for path in (tmp_path / "to").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out")
    assert left[0].endswith(".half")


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_what_is_there_already_is_replaced_only_when_asked(run: Path, tmp_path: Path, name: str) -> None:
    source, out = open_source(run), tmp_path / name
    export_weights(source, out, shard_bytes=300)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"{out} is there already; --force replaces it"):
        export_weights(source, out, shard_bytes=300)
    export_weights(source, out, shard_bytes=300, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_folder_with_other_things_in_it_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out holds notes.txt, which no export has written; it is not replaced"):
        export_weights(open_source(run), tmp_path / "out", force=True)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_types_that_safetensors_has_no_place_for_are_refused_by_name(tmp_path: Path) -> None:
    alone(lambda: save(tmp_path / "run", kept=Kept({"z": torch.ones(2, dtype=torch.complex128)})))
    source = open_source(tmp_path / "run")
    with pytest.raises(StateError, match=r"^z: safetensors has no type for torch.complex128; export to a .pt file"):
        export_weights(source, tmp_path / "out.safetensors", name="kept")
    export_weights(source, tmp_path / "out.pt", name="kept")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["z"].tolist() == [1, 1]


def test_a_name_that_safetensors_has_no_place_for_is_refused(tmp_path: Path) -> None:
    alone(lambda: save(tmp_path / "run", kept=Kept({"\ud800": torch.ones(2)})))
    with pytest.raises(StateError, match=r"^'\\ud800': safetensors takes no name that UTF-8 has no form of"):
        export_weights(open_source(tmp_path / "run"), tmp_path / "out.safetensors", name="kept")


def test_an_object_or_a_step_that_is_not_there_names_those_that_are(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="has no 'net'; it holds: model, kept"):
        export_weights(open_source(run), tmp_path / "out.pt", name="net")
    with pytest.raises(ConfigError, match="has no good checkpoint of step 8; there are: 7"):
        open_source(run, step=8)
    with pytest.raises(ConfigError, match=r"out\.gguf: a name that ends with"):
        export_weights(open_source(run), tmp_path / "out.gguf")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="neither a run nor weights in it"):
        open_source(tmp_path / "nothing")


def _sources(folder: Path) -> dict[str, Path]:
    """The same weights in every form."""
    weights = state()
    copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
    save_file(copies, folder / "one.safetensors")
    names = list(copies)
    (folder / "several").mkdir()
    where = {key: f"part-{n % 2}.safetensors" for n, key in enumerate(names)}
    for file in set(where.values()):
        save_file({key: copies[key] for key in names if where[key] == file}, folder / "several" / file)
    (folder / "several/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save(weights, folder / "one.pt")
    torch.save({"model": weights, "epoch": 3}, folder / "nested.pt")
    alone(lambda: dcp.save({"model": weights, "epoch": 3}, checkpoint_id=folder / "stock"))
    alone(lambda: dcp.save(dict(weights), checkpoint_id=folder / "flat"))
    in_world(2, lambda rank: save(folder / "run", 5, model=Odd()))
    return {
        "one": folder / "one.safetensors",
        "several": folder / "several",
        "index": folder / "several/model.safetensors.index.json",
        "torch": folder / "one.pt",
        "nested torch": folder / "nested.pt",
        "stock": folder / "stock",
        "flat stock": folder / "flat",
        "run": folder / "run",
        "checkpoint": folder_of(folder / "run", 5),
    }


def test_weights_of_every_form_are_imported_exported_and_loaded_with_equal_bits(tmp_path: Path) -> None:
    for number, (what, path) in enumerate(_sources(tmp_path).items()):
        out = tmp_path / f"{number}.pt"
        export_weights(open_source(path), out)
        assert unlike(torch.load(out, weights_only=True), state()) == [], what
        direct = Odd(2)
        load(path, {"model": direct})
        assert unlike(dict(direct.state_dict()), state()) == [], what
        adopt(open_source(path), tmp_path / f"run {number}")

        def restored(number: int = number) -> tuple[int | None, list[str]]:
            model = Odd(2)
            step = restore(tmp_path / f"run {number}", model=model)
            return step, unlike(dict(model.state_dict()), state())

        assert alone(restored) == (0, []), what


def test_the_form_that_torch_saved_in_long_ago_is_opened_too(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 2).t(), "n": torch.tensor(3)}
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    export_weights(open_source(tmp_path / "old.pt"), tmp_path / "new.safetensors")
    assert unlike(load_file(tmp_path / "new.safetensors"), weights) == []


def test_stock_dcp_opens_what_was_imported(tmp_path: Path) -> None:
    torch.save({"state_dict": state()}, tmp_path / "one.ckpt")
    folder = tmp_path / "run" / adopt(open_source(tmp_path / "one.ckpt"), tmp_path / "run", key="state_dict")
    found = {"model": {key: torch.zeros_like(tensor) for key, tensor in state().items()}}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert unlike(found["model"], state()) == []
    with pytest.raises(ConfigError, match="run has checkpoints already; give a new folder"):
        adopt(open_source(tmp_path / "one.ckpt"), tmp_path / "run", key="state_dict")
    with pytest.raises(StateError, match="has no 'model'; it holds: state_dict"):
        adopt(open_source(tmp_path / "one.ckpt"), tmp_path / "other")


def test_values_that_stock_dcp_pickled_come_back_and_the_others_are_refused_by_name(tmp_path: Path) -> None:
    values = {"epoch": 3, "log": [{"a": 1}, (2, 3)], "where": Path("/x")}
    alone(lambda: dcp.save({"model": state(), "trainer": values}, checkpoint_id=tmp_path / "stock"))
    source = open_source(tmp_path / "stock")
    assert source.manifest.tree["trainer"] == {"epoch": 3, "log": [{"a": 1}, {"$tuple": [2, 3]}]}
    assert dict(source.refused) == {"trainer.where": "it asks for pathlib.PosixPath"}
    export_weights(source, tmp_path / "out.pt")
    with pytest.raises(StateError, match=r"trainer.where can't be read without running code \(it asks for pathlib"):
        export_weights(source, tmp_path / "all.pt", name=None)


class Malicious:
    """Unpickled, it leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_planted_pickle_is_refused_by_the_name_of_what_it_calls(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "trap"
    stock = tmp_path / "stock"
    alone(lambda: dcp.save({"model": state(), "bad": Malicious(trap)}, checkpoint_id=stock))
    assert dict(open_source(stock).refused) == {"bad": "it asks for posix.mkdir"}
    (stock / METADATA).write_bytes(pickle.dumps(Malicious(trap), protocol=protocol))
    with pytest.raises(StateError, match=r"stock/.metadata asks for posix.mkdir, which no checkpoint of tensors needs"):
        open_source(stock)
    torch.save({"model": Malicious(trap)}, tmp_path / "bad.pt", pickle_protocol=max(2, protocol))
    with pytest.raises(StateError, match=r"bad.pt is no file of torch.save that can be read without running code"):
        open_source(tmp_path / "bad.pt")
    assert not trap.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "a/../../secret", METADATA])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    alone(lambda: dcp.save({"model": state()}, checkpoint_id=tmp_path / "stock"))
    (tmp_path / "secret").write_bytes((tmp_path / "stock/__0_0.distcp").read_bytes())
    index = pickle.loads((tmp_path / "stock" / METADATA).read_bytes())
    for info in index.storage_data.values():
        info.relative_path = path
    (tmp_path / "stock" / METADATA).write_bytes(pickle.dumps(index))
    with pytest.raises(StateError, match=f"leads to '{path}', out of the checkpoint's folder"):
        open_source(tmp_path / "stock")
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": {"a": path if "/" in path else ".."}}))
    with pytest.raises(StateError, match="out of its folder; it is not opened"):
        open_source(index_file)


def test_damaged_files_of_others_are_errors_and_no_crash(tmp_path: Path) -> None:
    _sources(tmp_path)
    for file in ("stock/.metadata", "one.safetensors", "one.pt", "several/model.safetensors.index.json"):
        path = tmp_path / file
        data = path.read_bytes()
        outcomes = set()
        for at in range(0, min(len(data), 4000), 37):
            broken = bytearray(data)
            broken[at] ^= 1 << at % 8
            path.write_bytes(broken)
            try:
                source = open_source(path)
                for item in source.manifest.tensors.values():
                    for chunk in item.chunks:
                        for _ in source.payload(item, chunk):
                            pass
                outcomes.add("opened")
            except (StateError, Damaged) as error:
                outcomes.add(type(error).__name__)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises((StateError, Damaged)):
            open_source(path)
        path.write_bytes(data)
        assert "StateError" in outcomes


BAD_SHAPES = ("[-2,-2]", "[2.0,2]", "[true,4]", '"4"', "4", "null", "[[4]]")


@pytest.mark.parametrize(
    ("shape", "offsets"), [*((bad, "[0,16]") for bad in BAD_SHAPES), ("[4]", "[0.0,16.0]"), ("[4]", "[-16,0]")]
)
def test_a_header_of_safetensors_with_sizes_that_can_not_be_is_refused(
    tmp_path: Path, shape: str, offsets: str
) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(StateError, match=r"a\.safetensors is no safetensors that can be read"):
        open_source(tmp_path / "a.safetensors")


def test_a_checkpoint_that_was_never_committed_is_no_source(run: Path) -> None:
    folder = folder_of(run, 7)
    copy = folder.with_name("step-00000009.e1.deadbeef")
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(NoGoodCheckpoint, match="was never committed, or is about to be deleted"):
        open_source(copy)
    elsewhere = run.parent / "copied"
    copy.rename(elsewhere)
    assert open_source(elsewhere).manifest == open_source(folder).manifest
    assert (elsewhere / MANIFEST).exists()
    assert bits(state()["halved"])
