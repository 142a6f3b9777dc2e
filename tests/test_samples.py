"""Which samples and which random numbers a micro-batch has: they follow from its place, not from the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.errors import DataError
from dtrain.training.data import Samples, digest_of
from dtrain.training.order import block, permute
from tests.saving import bits
from tests.training import built, opened, train
from tests.world import alone, errors, in_world


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 64, 100, 1023, 1024, 1025, 4097, 65537])
def test_a_permutation_takes_every_place_once_and_differs_by_key(length: int) -> None:
    places = np.arange(length)
    orders = [permute(places, length, key) for key in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), places)
    if length > 16:
        assert len({order.tobytes() for order in orders}) == 4
        assert all(np.mean(order == places) < 0.25 for order in orders)
    part = permute(places[length // 3 :], length, 2)
    assert np.array_equal(part, orders[2][length // 3 :]), "a place doesn't depend on what else is asked for"


def test_the_blocks_of_all_ranks_cover_the_list_once_and_in_order() -> None:
    for length in range(1, 40):
        for world in range(1, length + 1):
            blocks = [block(length, rank, world) for rank in range(world)]
            assert [index for part in blocks for index in part] == list(range(length))
            assert {len(part) for part in blocks} <= {length // world, length // world + 1}
            assert min(map(len, blocks)) > 0


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sample_is_used_once_an_epoch_also_when_batches_reach_into_the_next(tmp_path: Path, ranks: int) -> None:
    samples = 37

    def work(rank: int) -> list[list[int]]:
        used = []
        with opened(tmp_path) as run:
            model, optimizer, data = built(run, samples=samples)
            for step in run.steps(samples):  # eight epochs to the sample
                here: list[int] = []
                for x, ids in step.micro_batches(data):
                    here += ids.tolist()
                    step.backward(model(x).sum(), count=1)
                step.update(optimizer)
                used.append(here)
        return used

    ranked = in_world(ranks, work)
    sequence = [sample for parts in zip(*ranked, strict=True) for part in parts for sample in part]
    epochs = [sequence[at : at + samples] for at in range(0, len(sequence), samples)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(samples))] * 8
    assert len(set(map(tuple, epochs))) == 8, "each epoch has an order of its own"


def test_another_seed_is_another_order_and_other_weights(tmp_path: Path) -> None:
    one, other, again = (
        alone(lambda name=name, seed=seed: train(tmp_path / name, 3, seed=seed))  # type: ignore[misc]
        for name, seed in (("a", 1), ("b", 2), ("c", 1))
    )
    assert all(bits(one[key]) == bits(again[key]) for key in one)
    assert all(bits(one[key]) != bits(other[key]) for key in one)


def test_random_numbers_of_a_micro_batch_do_not_depend_on_who_computes_it(tmp_path: Path) -> None:
    def work(rank: int) -> dict[tuple[int, ...], list[float]]:
        drawn = {}
        with opened(tmp_path / str(torch.distributed.get_world_size())) as run:
            model, optimizer, data = built(run, dropout=0.5)
            for step in run.steps(5):
                for x, ids in step.micro_batches(data):
                    mask = nn.functional.dropout(torch.ones(16))
                    drawn[step.number, *ids.tolist()] = [*mask.tolist(), np.random.rand(), float(torch.rand(()))]
                    step.backward(model(x).sum(), count=len(x))
                step.update(optimizer)
        return drawn

    alone_drawn = in_world(1, work)[0]
    for ranks in (2, 3):
        together: dict[tuple[int, ...], list[float]] = {}
        for drawn in in_world(ranks, work):
            together |= drawn
        assert together == alone_drawn
    assert len({tuple(values) for values in alone_drawn.values()}) == 5 * 4, "each has numbers of its own"


class Private:
    """Draws from a generator of its own, whose state nobody knows."""

    def __init__(self, seed: int | None) -> None:
        self._own = np.random.default_rng(seed)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.from_numpy(self._own.normal(size=3))


@pytest.mark.parametrize("seed", [1, None])
def test_a_data_set_with_a_generator_of_its_own_is_refused(tmp_path: Path, seed: int | None) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            run.data(Private(seed), name="noisy")
            run.track(model=run.parallelize(nn.Linear(3, 1)))
            next(iter(run.steps(1)))

    for error in errors(2, work):
        assert isinstance(error, DataError)
        assert "noisy: sample 0 is another one each time that it is loaded" in str(error)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "jagged", "nested"])
def test_tensors_of_any_form_can_be_samples(kind: str) -> None:
    x = torch.eye(3)
    layout = torch.jagged if kind == "jagged" else torch.strided
    sample = x.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([x, x[:2]], layout=layout)
    assert digest_of([1, sample]) is None, "it can't be compared"
    assert Samples([sample], list, seed=0).fingerprint("data") != Samples([x], list, seed=0).fingerprint("data")


def test_a_tensor_is_hashed_as_what_it_stands_for() -> None:
    x = torch.randn(4, 3, dtype=torch.complex64)
    for view in (x.conj(), x.conj().imag, x.mT.conj(), x[0, 0].conj()):
        assert digest_of(view) == digest_of(view.resolve_conj().resolve_neg().clone())
    assert digest_of(x.conj()) != digest_of(x)
