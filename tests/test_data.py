"""How samples reach the loop: worker processes, streams, files of tokens, validation."""

from __future__ import annotations

import os
import random
import signal
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.checkpoint.state import bare
from dtrain.errors import DataError, UsageError
from dtrain.training.order import Order
from tests.layers import Net, curve, digest_of, samples
from tests.training import opened
from tests.world import alone, errors, in_world, outcomes


class Augmented:
    """Each sample is another one whenever it is drawn, by all kinds of random numbers, and says who has made it."""

    def __init__(self, length: int = 37) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [float(torch.rand(())), np.random.rand(), random.random()]
        return {"id": index, "noise": torch.tensor(noise, dtype=torch.float64), "pid": os.getpid()}

    def fingerprint(self) -> str:
        return "by whoever asks"


def seen(root: Path, steps: int, **options: Any) -> list[tuple[list[int], bytes]]:
    """Of each micro-batch: ids and the bytes of its random numbers."""
    workers = options.pop("workers", 0)
    found = []
    with opened(root, **options) as run:
        model = run.parallelize(nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = run.data(Augmented(), workers=workers)
        run.track(model=model, optimizer=optimizer)
        for step in run.steps(steps):
            for batch in step.micro_batches(data):
                assert (set(batch["pid"].tolist()) == {os.getpid()}) == (workers == 0)
                found.append((batch["id"].tolist(), batch["noise"].numpy().tobytes()))
                step.backward(model(batch["noise"].float()).sum(), count=len(batch["id"]))
            step.update(optimizer)
    return found


def test_workers_load_the_same_samples_with_the_same_random_numbers(tmp_path: Path) -> None:
    here = in_world(2, lambda rank: seen(tmp_path / "here", 12))
    assert in_world(2, lambda rank: seen(tmp_path / "workers", 12, workers=2)) == here
    assert in_world(2, lambda rank: seen(tmp_path / "cut", 5, workers=2)) == [rank[:10] for rank in here]
    assert in_world(2, lambda rank: seen(tmp_path / "cut", 12, workers=1)) == [rank[10:] for rank in here]


def test_the_random_numbers_of_a_sample_do_not_depend_on_the_others_of_its_micro_batch(tmp_path: Path) -> None:
    small, large = (
        in_world(1, lambda rank, size=size: seen(tmp_path / str(size), 6, micro_batch=size))[0]  # type: ignore[misc]
        for size in (2, 4)
    )
    assert b"".join(noise for _, noise in small) == b"".join(noise for _, noise in large)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_is_looked_into_first_has_its_samples_all_the_same(tmp_path: Path, workers: int) -> None:
    def work(rank: int) -> list[list[int]]:
        found = []
        with opened(tmp_path, global_batch=4, micro_batch=2) as run:
            model = run.parallelize(nn.Linear(1, 1))
            data = run.data(torch.arange(40), workers=workers, shuffle=False)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(3):
                if step.number == 2:
                    next(iter(step.micro_batches(data)))
                    step._open = False
                for batch in step.micro_batches(data):
                    found.append(batch.tolist())
                    step.backward(model(batch.float().unsqueeze(1)).sum(), count=2)
                step.update(optimizer)
            run.save(metrics={"test/loss": 1.0})  # behind the loop
        return found

    assert in_world(1, work) == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]]


def test_an_iterable_data_set_has_no_epochs_to_save_by(tmp_path: Path) -> None:
    (error,) = errors(1, lambda rank: streamed(tmp_path, 2, rank, save_every="1 epoch"))
    assert "save_every='1 epoch': an iterable data set has no epochs; give steps, or a time" in str(error)


def test_workers_ignore_the_signals_of_a_shutdown_and_die_with_their_trainer(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            model = run.parallelize(nn.Linear(3, 1))
            data = run.data(Augmented(), workers=2)
            run.track(model=model)
            for step in run.steps(1):
                for batch in step.micro_batches(data):
                    pids = set(children())
                    pids_seen.write_text(" ".join(map(str, pids)))
                    for pid in pids:
                        os.kill(pid, signal.SIGTERM)
                        os.kill(pid, signal.SIGINT)
                    step.backward(model(batch["noise"].float()).sum(), count=1)
                assert set(children()) == pids, "they are all there still"
                os.kill(os.getpid(), signal.SIGKILL)

    pids_seen = tmp_path / "pids"
    assert outcomes(1, work) == ["ended with -9"]
    pids = [int(pid) for pid in pids_seen.read_text().split()]
    assert len(pids) >= 2
    deadline = time.monotonic() + 5
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker has outlived its trainer"
        time.sleep(0.01)


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_worker_raises_reaches_the_loop_and_the_workers_end(tmp_path: Path) -> None:
    class Broken(Augmented):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise ValueError(f"sample {index} is no picture")

    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            data = run.data(Broken(), workers=1)
            run.track(model=run.parallelize(nn.Linear(1, 1)))
            for step in run.steps(1):
                next(iter(step.micro_batches(data)))

    (error,) = errors(1, work)
    assert "is no picture" in str(error)


class Stream(torch.utils.data.IterableDataset[int]):
    """Counts by as many as there are ranks, and begins again after 20."""

    def __init__(self, first: int, stride: int) -> None:
        self._first, self._stride, self._next = first, stride, first

    def __iter__(self) -> Iterator[int]:
        while self._next < 20:
            self._next += self._stride
            yield self._next - self._stride
        self._next = self._first

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


class Noisy(Stream):
    """Draws at the start of an epoch and with each sample, as data sets do that shuffle and augment."""

    def __iter__(self) -> Iterator[int]:
        torch.rand(())
        return (number + 1000 * int(torch.randint(1000, ())) for number in super().__iter__())


def streamed(
    root: Path, steps: int, rank: int, kind: type[Stream] = Stream, name: str = "data", **options: Any
) -> list[int]:
    found: list[int] = []
    with opened(root, **options) as run:
        model = run.parallelize(nn.Linear(1, 1))
        data = run.data(kind(rank, run.world_size), name=name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        run.track(model=model, optimizer=optimizer)
        for step in run.steps(steps):
            for batch in step.micro_batches(data):
                found += batch.tolist()
                step.backward(model(batch.float().unsqueeze(1)).sum(), count=1)
            step.update(optimizer)
    return found


def test_an_iterable_data_set_goes_on_where_it_was_with_as_many_ranks(tmp_path: Path) -> None:
    whole = in_world(2, lambda rank: streamed(tmp_path / "whole", 6, rank))
    assert whole[0][:12] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 0, 2]
    first = in_world(2, lambda rank: streamed(tmp_path / "cut", 4, rank))
    second = in_world(2, lambda rank: streamed(tmp_path / "cut", 6, rank))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    for error in errors(3, lambda rank: streamed(tmp_path / "cut", 7, rank)):
        assert isinstance(error, DataError)
        assert "goes on only with as many ranks as before; saved with 2 ranks, now 3" in str(error)


def test_an_iterable_data_set_that_has_another_name_now_is_refused(tmp_path: Path) -> None:
    """It would begin anew, and give its samples again."""
    in_world(1, lambda rank: streamed(tmp_path, 4, rank))
    (error,) = errors(1, lambda rank: streamed(tmp_path, 6, rank, name="train"))
    assert isinstance(error, DataError)
    assert "the checkpoint knows where 'data' was, and this run has 'train' in its stead" in str(error)


def test_an_iterable_data_set_can_be_added_or_left_out(tmp_path: Path) -> None:
    def work(names: list[str], steps: int) -> list[int]:
        found: list[int] = []
        with opened(tmp_path, global_batch=2, micro_batch=2) as run:
            model = run.parallelize(nn.Linear(1, 1))
            sources = [run.data(Stream(0, 1), name=name) for name in names]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(steps):
                for batch in step.micro_batches(sources[-1]):
                    found += batch.tolist()
                    step.backward(model(batch.float().unsqueeze(1)).sum(), count=1)
                step.update(optimizer)
        return found

    for names, steps, right in ((["a"], 2, [0, 1, 2, 3]), (["a", "b"], 3, [0, 1]), (["b"], 4, [2, 3])):
        assert alone(partial(work, names, steps)) == right


def test_an_iterable_data_set_is_not_for_ranks_that_compute_a_micro_batch_together(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, parallel="fsdp", tensor_parallel=2) as run:
            run.data(Stream(rank, 2))

    for error in errors(2, work):
        assert isinstance(error, UsageError)
        assert "tensor_parallel=2: ranks that compute a micro-batch together need the same samples" in str(error)


def test_what_an_iterable_data_set_draws_follows_from_the_micro_batch(tmp_path: Path) -> None:
    whole = in_world(1, lambda rank: streamed(tmp_path / "whole", 6, rank, Noisy))[0]
    first = in_world(1, lambda rank: streamed(tmp_path / "cut", 4, rank, Noisy))[0]
    assert first + in_world(1, lambda rank: streamed(tmp_path / "cut", 6, rank, Noisy))[0] == whole
    assert len(set(whole)) == len(whole)


def tokens_file(path: Path, count: int = 1000, dtype: str = "uint16") -> Path:
    np.arange(count, dtype=dtype).tofile(path)
    return path


def test_windows_of_tokens_overlap_by_one_and_cover_the_file(tmp_path: Path) -> None:
    tokens = dtrain.Tokens(tokens_file(tmp_path / "a.bin"), 10)
    assert len(tokens) == 99
    assert tokens[0].tolist() == list(range(11))
    assert tokens[98].tolist() == list(range(980, 991))
    assert tokens[3].dtype == torch.int64
    assert len(list(tokens)) == len(tokens)  # type: ignore[call-overload]
    assert tokens[-1].tolist() == tokens[98].tolist()
    assert [w.tolist() for w in tokens.__getitems__([5, 1])] == [tokens[5].tolist(), tokens[1].tolist()]
    other = dtrain.Tokens(tokens_file(tmp_path / "b.bin", 1001), 10)
    assert tokens.fingerprint() != other.fingerprint()


def test_a_file_of_tokens_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte, of which the disk holds nothing
    tokens = dtrain.Tokens(path, 1024)
    tracemalloc.start()
    assert tokens[len(tokens) - 1].tolist() == [0] * 1025
    tokens.fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_tokens_at_an_url_are_copied_once(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/t.bin", "wb") as file:
        file.write(np.arange(100, dtype="uint16").tobytes())
    made = dtrain.Tokens("memory://bucket/t.bin", 9, cache=tmp_path)
    assert made[1].tolist() == list(range(9, 19))
    fsspec.filesystem("memory").rm("/bucket/t.bin")
    again = dtrain.Tokens("memory://bucket/t.bin", 9, cache=tmp_path)
    assert again[1].tolist() == list(range(9, 19))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".lock"]


@pytest.mark.parametrize(
    ("count", "context", "dtype", "message"),
    [
        (10, 10, "uint16", "has 20 bytes: that is no file of at least 11 tokens of type uint16"),
        (11, 4, "uint32", "has 22 bytes: that is no file of at least 5 tokens of type uint32"),
        (10, 0, "uint16", r"Tokens\(context=0\): must be 1 or more"),
        (10, "4", "uint16", r"Tokens\(context='4'\): must be 1 or more"),
        (10, 4, "u16", r"Tokens\(dtype='u16'\): must be a type of whole numbers, such as uint16"),
        (10, 4, "float16", r"Tokens\(dtype='float16'\): must be a type of whole numbers"),
    ],
)
def test_a_file_that_holds_no_window_is_named(
    tmp_path: Path, count: int, context: Any, dtype: str, message: str
) -> None:
    path = tokens_file(tmp_path / "few.bin", count)
    with pytest.raises(DataError, match=message):
        dtrain.Tokens(path, context, dtype)
    with pytest.raises(DataError, match="No such file"):
        dtrain.Tokens(tmp_path / "none.bin", 4)
    with pytest.raises(DataError, match="is no file; name the file of tokens"):
        dtrain.Tokens(tmp_path, 4)
    with pytest.raises(DataError, match=r"could not be copied to .*: ValueError: Protocol not known: nowhere"):
        dtrain.Tokens("nowhere://x/tokens.bin", 4, cache=tmp_path)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("length", "ranks"), [(10, 1), (11, 2), (12, 3), (23, 4), (4, 4)])
def test_validation_takes_every_sample_once_and_leaves_the_training_alone(
    tmp_path: Path, kind: str, length: int, ranks: int
) -> None:
    def work(rank: int) -> tuple[list[int], str]:
        ids: list[int] = []
        with opened(tmp_path / "looked", global_batch=8, parallel=kind) as run:
            model = run.parallelize(Net())
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
            data = run.data(samples())
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(3):
                for x, y in step.micro_batches(data):
                    step.backward(nn.functional.cross_entropy(model(x), y, reduction="sum"), count=len(y))
                step.update(optimizer, clip=0.5)
                if step.number == 2:
                    held_out = torch.utils.data.TensorDataset(torch.randn(length, 7), torch.arange(length))
                    with torch.no_grad():
                        for x, numbers in run.once(held_out):
                            model(x)
                            ids += numbers.tolist()
            return ids, digest_of(bare(model))

    found = in_world(ranks, work)
    assert sorted(number for ids, _ in found for number in ids) == list(range(length))
    without = in_world(ranks, lambda rank: curve(tmp_path / "not", 3, global_batch=8, parallel=kind).digest)
    assert [digest for _, digest in found] == without


def test_an_order_of_a_billion_samples_is_found_at_any_place_at_once() -> None:
    """The time is for `benchmarks/data.py`; here, that it takes no memory and is a permutation where it can be seen."""
    order = Order(10**9, seed=1, shuffle=True)
    tracemalloc.start()
    far = order.ids(7 * 10**9 - 16, 7 * 10**9 + 16)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(set(far.tolist())) == 32
    assert order.ids(7 * 10**9 - 1, 7 * 10**9)[0] == far[15]
    for length in (1, 2, 101, 4096, 10_007):
        small = Order(length, seed=1, shuffle=True)
        for epoch in range(3):
            assert sorted(small.ids(epoch * length, (epoch + 1) * length).tolist()) == list(range(length))
