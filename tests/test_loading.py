"""Loading without a run: which bytes are read and checked, which differences are errors, what patterns choose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dtrain.checkpoint import Reader, load
from dtrain.checkpoint.blocks import Want, read_blocks
from dtrain.checkpoint.format import BLOCK_BYTES, MANIFEST, Chunk
from dtrain.checkpoint.reader import load_tensors
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError
from dtrain.storage.local import LocalStorage
from tests.saving import Kept, bits, differences
from tests.steps_of_a_run import flip
from tests.world import alone, errors, in_world
from tests.written import in_blocks_of, manifest_of, only_chunk, write, write_tree

LARGE = 3 * BLOCK_BYTES // 4 + 1000
"""Elements of a float32 tensor that takes up a bit more than three blocks."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a large tensor between small ones."""
    tensors = {"first": torch.tensor(1.0), "large": numbers(LARGE), "last": torch.tensor(2.0)}
    return alone(lambda: write_tree(tmp_path_factory.mktemp("large"), tensors))


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)


def read_slice(folder: Path, start: int, count: int, chunk: Chunk | None = None) -> tuple[torch.Tensor, int]:
    """A part of the large tensor, and how many bytes were read for it."""
    found = torch.full((count,), -1.0)
    want = Want("large", chunk or only_chunk(folder, "large"), torch.float32, [start], found)
    return found, read_blocks(LocalStorage(str(folder)), ".", [want], BLOCK_BYTES)


@pytest.mark.parametrize("start", [0, 500_000, BLOCK_BYTES // 4 - 400, LARGE - 16])
def test_a_slice_of_64_bytes_costs_the_blocks_that_it_lies_in(large: Path, start: int) -> None:
    found, read = read_slice(large, start, 16)
    assert found.tolist() == numbers(LARGE)[start : start + 16].tolist()
    chunk = only_chunk(large, "large")
    first, last = chunk.payload + 4 * start, chunk.payload + 4 * start + 63
    count = last // BLOCK_BYTES - first // BLOCK_BYTES + 1
    assert read == (chunk.length % BLOCK_BYTES if start == LARGE - 16 else count * BLOCK_BYTES)


def test_without_digests_a_slice_costs_its_own_bytes(large: Path) -> None:
    bare = only_chunk(large, "large")._replace(digests=b"")
    found, read = read_slice(large, 777, 16, bare)
    assert (found.tolist(), read) == (numbers(LARGE)[777:793].tolist(), 64)


def test_a_flipped_bit_is_found_where_its_block_is_needed_and_only_there(large: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(large, folder)
    chunk = only_chunk(folder, "large")
    flip(folder / chunk.file, chunk.offset + BLOCK_BYTES + 12345)
    second = BLOCK_BYTES // 4
    for start in (0, 2 * second):
        assert read_slice(folder, start, 16)[0].tolist() == numbers(LARGE)[start : start + 16].tolist()
    for start in (second, 2 * second - 1000):
        with pytest.raises(Damaged) as caught:
            read_slice(folder, start, 16)
        begin = chunk.offset + BLOCK_BYTES
        assert str(caught.value) == (
            f"./{chunk.file}: bytes {begin} to {begin + BLOCK_BYTES} are not those that were saved (large)"
        )


def test_every_flipped_bit_of_a_small_checkpoint_is_found(tmp_path: Path) -> None:
    """In frames too, and in what lies in the same read."""
    folder = alone(lambda: write_tree(tmp_path, {f"t{number}": torch.full((9,), float(number)) for number in range(3)}))
    manifest = manifest_of(folder)
    (file,) = {chunk.file for item in manifest.tensors.values() for chunk in item.chunks}
    whole = (folder / file).read_bytes()
    items = [chunk for item in manifest.tensors.values() for chunk in item.chunks]
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (folder / file).write_bytes(data)
        targets = {name: torch.zeros(9) for name in manifest.tensors}
        if any(chunk.offset <= place < chunk.offset + chunk.length for chunk in items):
            with pytest.raises(Damaged, match="are not those that were saved"):
                load_tensors(LocalStorage(str(folder)), ".", manifest, targets)
        else:
            load_tensors(LocalStorage(str(folder)), ".", manifest, targets)


def test_small_neighbours_are_read_at_once(tmp_path: Path) -> None:
    folder = alone(lambda: write_tree(tmp_path, {f"t{n}": torch.tensor(float(n)) for n in range(300)}))
    storage = LocalStorage(str(folder))
    reads: list[int] = []
    read_into = storage.read_into

    def counted(path: str, offset: int, buffers: Any) -> None:
        reads.append(sum(buffer.nbytes for buffer in buffers))
        read_into(path, offset, buffers)

    storage.read_into = counted  # type: ignore[method-assign]
    targets = {f"t{n}": torch.tensor(-1.0) for n in range(300)}
    assert load_tensors(storage, ".", manifest_of(folder), targets) == sum(reads)
    assert len(reads) == 1
    assert [tensor.item() for tensor in targets.values()] == list(range(300))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_share_the_reads_and_leave_nothing_open(large: Path, threads: int) -> None:
    storage = LocalStorage(str(large))
    targets = {"large": torch.zeros(LARGE), "first": torch.zeros(()), "last": torch.zeros(())}
    manifest = in_blocks_of(1 << 16, large)
    before = set(Path("/proc/self/fd").iterdir())
    read = load_tensors(storage, ".", manifest, targets, threads=threads)
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert bits(targets["large"]) == bits(numbers(LARGE))
    length = sum(chunk.length for item in manifest.tensors.values() for chunk in item.chunks)
    assert length <= read < length + 3 * 64
    flip(large / (chunk := manifest.tensors["large"].chunks[0]).file, place := chunk.offset + 5_000_000)
    try:
        with pytest.raises(Damaged, match=r"\(large\)"):
            load_tensors(storage, ".", manifest, targets, threads=threads)
    finally:
        flip(large / chunk.file, place)
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3), "large: saved with shape (3146728,), to be loaded into (3,)"),
        (
            torch.zeros(LARGE, dtype=torch.int32),
            "large: saved as float32, to be loaded into int32; load it into a tensor",
        ),
    ],
)
def test_a_target_of_another_shape_or_type_is_refused(large: Path, target: torch.Tensor, message: str) -> None:
    with pytest.raises(StateError) as caught:
        load_tensors(LocalStorage(str(large)), ".", manifest_of(large), {"large": target})
    assert str(caught.value).startswith(message)
    assert target.count_nonzero() == 0
    with pytest.raises(StateError, match="nobody: not in the checkpoint"):
        load_tensors(LocalStorage(str(large)), ".", manifest_of(large), {"nobody": torch.zeros(1)})


def test_a_target_that_is_not_contiguous_or_is_converted_gets_the_right_elements(large: Path) -> None:
    manifest, storage = manifest_of(large), LocalStorage(str(large))
    strided = torch.zeros(LARGE, 2)
    load_tensors(storage, ".", manifest, {"large": strided[:, 1]})
    assert bits(strided[:, 1]) == bits(numbers(LARGE))
    assert strided[:, 0].count_nonzero() == 0
    double = torch.zeros(LARGE, dtype=torch.float64)
    load_tensors(storage, ".", manifest, {"large": double}, cast=["large"])
    assert bits(double) == bits(numbers(LARGE).double())


def test_a_file_that_ends_early_or_is_gone_is_named(large: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(large, folder)
    chunk = only_chunk(folder, "large")
    whole = (folder / chunk.file).read_bytes()
    (folder / chunk.file).write_bytes(whole[: chunk.offset + 2 * BLOCK_BYTES])
    with pytest.raises(Damaged, match=rf"{chunk.file}: .* ends at byte \d+"):
        read_slice(folder, LARGE - 16, 16)
    (folder / chunk.file).unlink()
    with pytest.raises(Damaged, match=f"{chunk.file}: .*No such file"):
        read_slice(folder, 0, 16)


def test_chunks_that_leave_something_out_are_found(large: Path) -> None:
    manifest = manifest_of(large)
    item = manifest.tensors["large"]
    half = item.chunks[0]._replace(sizes=[LARGE // 2])
    manifest.tensors["large"] = replace(item, chunks=[half])
    with pytest.raises(Damaged, match=f"the chunks of large leave out {LARGE // 2} of the elements"):
        load_tensors(LocalStorage(str(large)), ".", manifest, {"large": torch.zeros(LARGE)})


def test_elements_of_different_sizes_without_a_gap_between_them_find_their_places(tmp_path: Path) -> None:
    """As other programs write them: nothing is aligned. Targets with gaps, so that all of it is copied."""
    flags, values = torch.tensor([True, False, True]), numbers(4)
    (tmp_path / "file").write_bytes(bits(flags) + bits(values))
    targets = [torch.zeros(3, 2, dtype=torch.bool), torch.zeros(4, 2)]
    wants = [
        Want("flags", Chunk("file", 0, 3, b"", 0, [0], [3]), torch.bool, [0], targets[0][:, 1]),
        Want("values", Chunk("file", 3, 16, b"", 0, [0], [4]), torch.float32, [0], targets[1][:, 1]),
    ]
    assert read_blocks(LocalStorage(str(tmp_path)), ".", wants, BLOCK_BYTES) == 19
    assert (targets[0][:, 1].tolist(), targets[1][:, 1].tolist()) == (flags.tolist(), values.tolist())


# Models


def made(seed: int, hidden: int = 4, names: tuple[str, ...] = ("encoder", "head")) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(3, hidden))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "kept": Kept({"seed": seed, "at": torch.tensor(seed)})}


def tree(objects: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value.state_dict()) for name, value in objects.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        alone(lambda step=step: write(root, step, **made(step)))  # type: ignore[misc]
    return root


@pytest.mark.parametrize(("step", "expected"), [(None, 2), (2, 2), (1, 1)])
def test_the_newest_checkpoint_of_a_run_is_loaded_or_that_of_a_step(run: Path, step: int | None, expected: int) -> None:
    objects = made(9)
    loaded = load(run, objects, step=step)
    assert (loaded.step, loaded.left) == (expected, ())
    assert list(differences(tree(made(expected)), tree(objects))) == []
    folder = next((run / "checkpoints").glob(f"step-{expected:08d}*"))
    assert load(str(folder), made(9)) == loaded


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = next((copy / "checkpoints").glob("step-00000002*"))
    flip(newest / MANIFEST, 100)
    with pytest.warns(UserWarning, match=r"checkpoint of step 2 is damaged and passed over: .*manifest.json"):
        assert load(copy, made(9)).step == 1
    with pytest.raises(NoGoodCheckpoint, match=r"step 2: .*manifest.json is not the one that was committed"):
        load(copy, made(9), step=2)
    with pytest.raises(ConfigError, match="no good checkpoint of step 7; there are: 1, 2"):
        load(copy, made(9), step=7)


def test_a_damaged_tensor_is_an_error_on_all_ranks(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = next((copy / "checkpoints").glob("step-00000002*"))
    chunk = only_chunk(newest, "model.head.weight")
    flip(newest / chunk.file, chunk.offset + chunk.payload)
    found = errors(2, lambda rank: load(copy, made(9) if rank else {"model": made(9)["model"]}, only="model.*"))
    found += errors(2, lambda rank: load(copy, {"model": made(9)["model"]}, skip="*.head.*" if rank else ()))
    for error in found:
        assert isinstance(error, Damaged)
        assert str(error).startswith(f"rank 0: checkpoints/{newest.name}/{chunk.file}: bytes {chunk.offset} to ")
        assert str(error).endswith(
            "(model.head.weight); take another step or another copy, and objects that are made anew"
        )
    assert in_world(2, lambda rank: load(copy, {"model": made(9)["model"]}, skip="*.head.*").step) == [2, 2]


def test_weights_alone_are_loaded_without_a_word_on_the_rest(run: Path) -> None:
    objects = made(9)
    loaded = load(run, {"model": objects["model"]})
    assert loaded.tensors == ("model.encoder.weight", "model.encoder.bias", "model.head.weight", "model.head.bias")
    assert list(differences(tree(made(2))["model"], tree(objects)["model"])) == []
    assert list(differences(tree(made(9))["optimizer"], tree(objects)["optimizer"])) == []


@pytest.mark.parametrize(
    ("choice", "loaded"),
    [
        ({"only": ["model.encoder.*"]}, ["model.encoder.bias", "model.encoder.weight"]),
        ({"only": "*.bias", "skip": "*.head.*"}, ["model.encoder.bias"]),
        ({"skip": ["model.head.*", "optimizer.*", "kept.*"]}, ["model.encoder.bias", "model.encoder.weight"]),
        ({"only": ["kept*"]}, ["kept.at"]),
        (
            {"only": ["optimizer.state.head.bias.*"]},
            [f"optimizer.state.head.bias.{key}" for key in ("exp_avg", "exp_avg_sq", "step")],
        ),
        ({"only": ["optimizer.param_groups.0.lr"]}, []),
    ],
)
def test_patterns_choose_what_is_loaded_and_all_else_stays(
    run: Path, choice: dict[str, Any], loaded: list[str]
) -> None:
    objects = made(9)
    assert sorted(load(run, objects, **choice).tensors) == loaded
    saved, before, now = tree(made(2)), tree(made(9)), tree(objects)
    for name in ("encoder.weight", "encoder.bias", "head.weight", "head.bias"):
        expected = saved if f"model.{name}" in loaded else before
        assert bits(now["model"][name]) == bits(expected["model"][name])
    numbers = {name: index for index, (name, _) in enumerate(made(9)["model"].named_parameters())}
    for name, index in numbers.items():
        expected = saved if f"optimizer.state.{name}.step" in loaded else before
        assert list(differences(expected["optimizer"]["state"][index], now["optimizer"]["state"][index])) == []
    rate = saved if choice["only" if "only" in choice else "skip"] == ["optimizer.param_groups.0.lr"] else before
    assert now["optimizer"]["param_groups"][0]["lr"] == rate["optimizer"]["param_groups"][0]["lr"]
    assert now["kept"]["seed"] == (2 if "kept.at" in loaded else 9)


def test_what_means_nothing_in_part_is_not_loaded_in_part(run: Path) -> None:
    with pytest.raises(StateError) as caught:
        load(run, made(9), skip="*.exp_avg_sq")
    assert str(caught.value).startswith(
        "optimizer.state.encoder.weight can be loaded only as a whole, and the patterns choose 2 of 3 of its values"
    )
    with pytest.raises(StateError, match="kept can be loaded only as a whole"):
        load(run, made(9), only="kept.seed")


@pytest.mark.parametrize(
    "option", ["only", "skip", "allow_missing", "allow_unexpected", "allow_reshaped", "allow_retyped"]
)
def test_a_pattern_that_matches_nothing_names_what_is_close(run: Path, option: str) -> None:
    objects = made(9)
    with pytest.raises(StateError) as caught:
        load(run, objects, **{option: ["model.encodr.weight"]})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{option}='model.encodr.weight' matches nothing in {run}/checkpoints/step-")
    assert "the closest are model.encoder.weight, " in str(caught.value)
    assert list(differences(tree(made(9)), tree(objects))) == []


def other_model() -> nn.Module:
    model: nn.Module = made(9, names=("encoder", "extra"))["model"]
    model.encoder = nn.Linear(3, 5, bias=False)
    model.encoder.register_parameter("bias", nn.Parameter(torch.randn(4, dtype=torch.float64)))
    return model


DIFFERENCES = {
    "missing": ["model.extra.bias: not in the checkpoint", "model.extra.weight: not in the checkpoint"],
    "unexpected": ["model.head.bias: in the checkpoint only", "model.head.weight: in the checkpoint only"],
    "reshaped": ["model.encoder.weight: saved with shape (4, 3), now (5, 3)"],
    "retyped": ["model.encoder.bias: saved as float32, now float64"],
}


def test_all_differences_are_listed_at_once_and_nothing_is_changed(run: Path) -> None:
    model = other_model()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(StateError) as caught:
        load(run, {"model": model})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("the objects are not what was saved in ")
    assert sorted(line.strip() for line in lines[1:-1]) == sorted(
        line for kind in DIFFERENCES.values() for line in kind
    )
    assert "allow_missing" in lines[-1]
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_difference_that_is_allowed_by_name_is_not_listed_any_more(run: Path, kind: str) -> None:
    names = [line.partition(":")[0] for line in DIFFERENCES[kind]]
    with pytest.raises(StateError) as caught:
        load(run, {"model": other_model()}, **{f"allow_{kind}": names})  # type: ignore[arg-type]
    listed = sorted(line.strip() for line in str(caught.value).splitlines()[1:-1])
    assert listed == sorted(line for other in DIFFERENCES if other != kind for line in DIFFERENCES[other])


def test_with_all_allowed_what_fits_is_loaded_and_converted_and_the_rest_stays(run: Path) -> None:
    model = other_model()
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    allowed: dict[str, Any] = {f"allow_{kind}": "model.*" for kind in DIFFERENCES}
    loaded = load(run, {"model": model}, **allowed)
    assert loaded.tensors == ("model.encoder.bias",)
    assert loaded.left == ("model.encoder.weight", "model.head.weight", "model.head.bias")
    now = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    expected = before | {"encoder.bias": bits(made(2)["model"].encoder.bias.double())}
    assert now == expected


def test_what_is_not_chosen_may_differ(run: Path) -> None:
    model = other_model()
    assert load(run, {"model": model}, only="model.encoder.bias", allow_retyped="*.bias").tensors == (
        "model.encoder.bias",
    )
    skip = ["model.extra.*", "model.head.*", "model.encoder.weight"]
    assert load(run, {"model": model}, skip=skip, allow_retyped="*").tensors == ("model.encoder.bias",)


def test_an_optimizer_follows_the_model_it_is_of(run: Path) -> None:
    objects = made(9, names=("encoder", "extra"))
    with pytest.raises(StateError) as caught:
        load(run, objects)
    assert "optimizer" not in str(caught.value), "it would only repeat what is said of the model"
    load(run, objects, allow_missing="model.extra.*", allow_unexpected="model.head.*")
    saved, fresh = made(2)["optimizer"].state_dict(), made(9, names=("encoder", "extra"))["optimizer"].state_dict()
    now = objects["optimizer"].state_dict()
    for index, source in enumerate((saved, saved, fresh, fresh)):
        assert list(differences(source["state"][index], now["state"][index])) == []
    assert now["param_groups"][0]["lr"] == saved["param_groups"][0]["lr"]
    for parameter in objects["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    objects["optimizer"].step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: {"ema": o["model"]}, "ema: tracked now, but not in the checkpoint"),
        (
            lambda o: o | {"kept": torch.optim.SGD(o["model"].parameters())},
            "kept: an optimizer now, but something else",
        ),
        (
            lambda o: {**o, "optimizer": torch.optim.SGD([{"params": [p]} for p in o["model"].parameters()])},
            "optimizer: saved with 1 parameter groups, now 4",
        ),
        (
            lambda o: {**o, "optimizer": torch.optim.AdamW(o["model"].encoder.parameters())},
            "optimizer: head.bias left group 0",
        ),
        (lambda o: {**o, "optimizer": torch.optim.SGD(o["model"].parameters())}, "saved by another kind of optimizer"),
    ],
)
def test_other_objects_are_refused(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    with pytest.raises(StateError) as caught:
        load(run, change(made(9)))
    assert message in str(caught.value)


def test_more_than_twenty_differences_are_counted(run: Path) -> None:
    objects = made(9, names=tuple(f"layer{number}" for number in range(30)))
    with pytest.raises(StateError, match=r"\n  \.\.\. and 44 more\n"):
        load(run, {"model": objects["model"]})


# DCP


def test_dcp_loads_through_a_reader_of_a_run_folder(run: Path) -> None:
    def work() -> list[str]:
        objects = made(9)
        state = {"model": dict(objects["model"].state_dict()), "kept": objects["kept"].value}
        reader = Reader.open(run, step=1)
        dcp.load(state, storage_reader=reader)
        chunks = [
            chunk
            for item in manifest_of(run / "checkpoints/step-00000001.e1.0").tensors.values()
            for chunk in item.chunks
        ]
        assert 0 < reader.bytes_read < sum(chunk.length for chunk in chunks), "the optimizer's state was not asked for"
        return list(differences({"model": tree(made(1))["model"], "kept": made(1)["kept"].value}, state))

    assert in_world(2, lambda rank: work()) == [[], []]


def test_dcp_is_told_of_a_type_that_differs_instead_of_a_silent_cast(run: Path) -> None:
    def work() -> None:
        state = {"model": {"head.bias": torch.zeros(4, dtype=torch.float64)}}
        dcp.load(state, storage_reader=Reader.open(run))

    with pytest.raises(Exception, match=r"model\.head\.bias: saved as float32, to be loaded into float64"):
        alone(work)
