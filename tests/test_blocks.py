"""Reading tensors by blocks: which bytes are read for a part of one, that each is checked, and for one tensor once."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dtrain.checkpoint import Reader, load
from dtrain.checkpoint.blocks import Want, read_blocks
from dtrain.checkpoint.format import BLOCK_BYTES, Chunk
from dtrain.checkpoint.reader import load_tensors
from dtrain.errors import Damaged, StateError
from dtrain.storage.local import LocalStorage
from tests.saving import bits
from tests.steps_of_a_run import flip
from tests.world import Raised, alone
from tests.written import in_blocks_of, manifest_of, only_chunk, write, write_tree

LARGE = 3 * BLOCK_BYTES // 4 + 1000
"""Elements of a float32 tensor that takes up a bit more than three blocks."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a large tensor between small ones."""
    tensors = {"first": torch.tensor(1.0), "large": numbers(LARGE), "last": torch.tensor(2.0)}
    folder = tmp_path_factory.mktemp("large")
    return alone(lambda: write_tree(folder, tensors))


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


@pytest.mark.parametrize("threads", [1, 7])
def test_more_files_than_a_process_may_open_are_read(tmp_path: Path, threads: int) -> None:
    """As many as there are ranks may have saved."""
    for number in range(200):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 8)
    targets = [torch.zeros(8, dtype=torch.uint8) for _ in range(200)]
    wants = [
        Want("t", Chunk(str(number), 0, 8, b"", 0, [0], [8]), torch.uint8, [0], target)
        for number, target in enumerate(targets)
    ]
    before = set(Path("/proc/self/fd").iterdir())
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 40, hard))
    try:
        read_blocks(LocalStorage(str(tmp_path)), ".", wants, BLOCK_BYTES, threads)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert [target.tolist() for target in targets] == [[number] * 8 for number in range(200)]
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
    manifest.tensors["large"] = item._replace(chunks=[half])
    with pytest.raises(Damaged, match=f"the chunks of large leave out {LARGE // 2} of the elements"):
        load_tensors(LocalStorage(str(large)), ".", manifest, {"large": torch.zeros(LARGE)})


@pytest.mark.parametrize("offset", [0, 1, LARGE // 2 - 1])
def test_chunks_that_overlap_are_found_though_their_elements_are_as_many_as_are_needed(
    large: Path, offset: int
) -> None:
    manifest = manifest_of(large)
    item = manifest.tensors["large"]
    halves = [item.chunks[0]._replace(offsets=[start], sizes=[LARGE // 2]) for start in (0, offset)]
    manifest.tensors["large"] = item._replace(chunks=halves)
    with pytest.raises(Damaged, match="the chunks of large leave out 0 of the elements that are needed, or overlap"):
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


class Pair(nn.Module):
    """Two weights, which may be one."""

    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        if tied:
            self.b.weight = self.a.weight


FORMS: dict[str, Callable[[Path, nn.Module], object]] = {
    "checkpoint": lambda path, model: alone(lambda: write(path, model=model)),
    "stock": lambda path, model: dcp.save({"model": dict(model.state_dict())}, checkpoint_id=path, no_dist=True),
    "torch": lambda path, model: torch.save(model.state_dict(), path),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_tied_now_are_loaded_if_they_were_the_same(tmp_path: Path, form: str) -> None:
    FORMS[form](tmp_path / "tied", one := Pair(1, tied=True))
    FORMS[form](tmp_path / "apart", two := Pair(2, tied=False))
    for model in (Pair(3, tied=True), Pair(3, tied=False)):
        load(tmp_path / "tied", {"model": model})
        assert bits(model.a.weight) == bits(model.b.weight) == bits(one.a.weight)
    model = Pair(3, tied=True)
    with pytest.raises(StateError, match=r"model\.a\.weight and model\.b\.weight are one tensor now, and two differ"):
        load(tmp_path / "apart", {"model": model})
    assert bits(model.a.weight) == bits(Pair(3, tied=True).a.weight)
    load(tmp_path / "apart", {"model": model}, skip="model.a.weight")
    assert bits(model.a.weight) == bits(two.b.weight)


@pytest.mark.parametrize("form", FORMS)
def test_dcp_loads_tied_weights_through_a_reader_if_they_were_the_same(tmp_path: Path, form: str) -> None:
    def loaded(path: Path) -> bytes:
        model = Pair(3, tied=True)
        dcp.load({"model": dict(model.state_dict())}, storage_reader=Reader.open(path))
        return bits(model.a.weight)

    for name in ("tied", "apart"):
        FORMS[form](tmp_path / name, Pair(1, tied=name == "tied"))
    assert alone(lambda: loaded(tmp_path / "tied")) == bits(Pair(1, tied=True).a.weight)
    with pytest.raises(Raised, match=r"model\.a\.weight and model\.b\.weight are one tensor now"):
        alone(lambda: loaded(tmp_path / "apart"))
