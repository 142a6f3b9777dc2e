"""Values of all kinds go into a manifest and come back the same; what can't is refused by name, never pickled."""

from __future__ import annotations

import collections
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.checkpoint.tree import decode, encode, flatten
from dtrain.errors import SaveError, StateError
from tests.saving import Kept, Saver, commits, differences, round_trip, save
from tests.world import alone, errors, in_world


def through_json(tree: Any) -> Any:
    tensors = {name: leaf for name, (_, leaf) in flatten(tree).items() if isinstance(leaf, torch.Tensor)}
    return decode(json.loads(json.dumps(encode(tree))), tensors.__getitem__)


def random_tree(pick: random.Random, depth: int) -> Any:
    plain: list[Callable[[], Any]] = [
        lambda: None,
        lambda: pick.random() < 0.5,
        lambda: pick.randint(-(2**70), 2**70),
        lambda: -(2 ** pick.randint(1023, 1025)),
        lambda: pick.choice([0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, pick.uniform(-1e300, 1e300)]),
        lambda: pick.choice(["", "a.b", "$tensor", "ü\n", "\ud800", "x" * 99]),
        lambda: pick.randbytes(pick.randint(0, 9)),
        lambda: torch.Size([pick.randint(0, 9), 2]),
        lambda: pick.choice([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)]),
        lambda: frozenset({pick.randint(0, 9), "a", (1, 2.5), frozenset({None})}),
        lambda: {pick.randint(0, 9), "a", (1, b"2")},
        lambda: np.random.default_rng(pick.randint(0, 99)).normal(size=(pick.randint(0, 3), 2)).astype(">f4"),
        lambda: pick.choice([np.float32(1.5), np.int8(-3), np.bool_(True), np.array(7), np.array(["ab", "c"])]),
        lambda: torch.randn(pick.randint(0, 3)),
    ]
    if depth == 0 or pick.random() < 0.2:
        return pick.choice(plain)()
    inner = [random_tree(pick, depth - 1) for _ in range(pick.randint(0, 4))]
    keys = pick.sample(["a", "b.", "$tensor", "$items", "", 7, -2.5, None, True, (1, "x"), b"k", "$"], len(inner))
    form = pick.choice(["list", "tuple", "texts", "keys"])
    if form == "keys":
        return dict(zip(keys, inner, strict=True))
    if form == "texts":
        return {f"{'$' * (index % 2)}{index}": value for index, value in enumerate(inner)}
    return inner if form == "list" else tuple(inner)


@pytest.mark.parametrize("seed", range(300))
def test_a_random_tree_of_values_comes_back_with_the_same_types_and_bits(seed: int) -> None:
    tree = {"kept": random_tree(random.Random(seed), 4)}
    try:
        flatten(tree)
    except StateError:  # two values of one name
        return
    assert list(differences(tree, through_json(tree))) == []


TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex128, torch.complex64),
]


def test_tensors_of_all_types_and_forms_come_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 8, generator=generator) * 50
    wave = torch.complex(base, base.flip(0))
    state: dict[str, Any] = {
        "types": [base.to(dtype) for dtype in TYPES],
        "of no dimension": [base[1, 1].to(dtype) for dtype in TYPES],
        "of no elements": [base[:0].to(dtype) for dtype in TYPES] + [torch.empty(3, 0, 2)],
        "views": {
            "of a row": base[3],
            "of a column": base[:, 3],
            "transposed": base.t(),
            "strided": base[::2, 1::3],
            "expanded": base[:, :1].expand(6, 5),
            "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
            "conjugate": wave.conj(),
            "negative": torch._neg_view(base),
            "imaginary part of a conjugate": wave.conj().imag,
        },
        "not a number": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "needs a gradient": torch.nn.Parameter(base.clone()),
        "long": torch.arange(1_200_000),  # several blocks of digests
    }
    again = alone(lambda: round_trip(tmp_path, state))
    state["needs a gradient"] = state["needs a gradient"].detach()
    assert list(differences(state, again)) == []


def test_nested_plain_values_come_back_through_a_checkpoint(tmp_path: Path) -> None:
    history: dict[Any, Any] = {0: {"loss": [1.5, math.nan], "best": math.inf}, 1: {}, (2, "a"): ()}
    state = {
        "history": history,
        "shape": (3, (torch.ones(2), [torch.zeros(1), "x"]), []),
        "raw": b"\x00\xff",
        "counts": np.arange(6).reshape(2, 3).T,
        "$tensor": "a text",
        "random": random.Random(1).getstate(),
        "numpy": np.random.default_rng(1).bit_generator.state,
        "nothing": None,
    }
    assert list(differences(state, alone(lambda: round_trip(tmp_path, state)))) == []


@pytest.mark.parametrize("value", [None, 3, [], {}, "text", torch.ones(2), [torch.ones(1), {"a": 2}], (1, {2: 3})])
def test_a_state_need_not_be_a_dict(tmp_path: Path, value: Any) -> None:
    assert list(differences(value, alone(lambda: round_trip(tmp_path, value)))) == []


class Thing:
    def __repr__(self) -> str:
        return "a thing"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, Thing()]}, "kept.a.1: a Thing can't be saved without pickle; let state_dict() return"),
        ({"a": {"rate": lambda: 1}}, "kept.a.rate: a function can't be saved without pickle"),
        ({"a": {3: {"b": 1j}}}, "kept.a.3.b: a complex can't be saved without pickle"),
        ({"a": bytearray(2)}, "kept.a: a bytearray can't be saved without pickle"),
        ({"a": np.array([1, "x"], dtype=object)}, "kept.a: a numpy array of object can't be saved"),
        ({"a": np.zeros(2, dtype=[("x", "i4")])}, "kept.a: a numpy array of [('x', '<i4')] can't be saved"),
        ({"a": np.ma.masked_array([1, 2], mask=[False, True])}, "kept.a: a numpy array of int64 can't be saved"),
        ({"a": torch.eye(2).to_sparse()}, "kept.a: a sparse_coo tensor can't be saved"),
        ({"a": torch.empty(2, device="meta")}, "kept.a: a meta tensor can't be saved"),
        ({"a": {torch.ones(1)}}, "kept.a: a tensor in a set, or as a key, can't be saved"),
        ({"a": {torch.ones(1): 2}}, "kept.a: a tensor in a set, or as a key, can't be saved"),
        ({"a.b": 1, "a": {"b": 2}}, "two values in the state are called 'kept.a.b'; rename one of them"),
        ({1: 1, "1": 2}, "two values in the state are called 'kept.1'; rename one of them"),
    ],
)
def test_what_can_not_be_saved_without_pickle_is_refused_by_its_place(tmp_path: Path, value: Any, message: str) -> None:
    found = errors(2, lambda rank: save(tmp_path, kept=Kept(value)))
    assert [type(error) for error in found] == [StateError] * 2
    assert all(str(error).startswith(message) for error in found), found
    assert not (tmp_path / "checkpoints").exists()


def test_what_was_refused_once_is_refused_again(tmp_path: Path) -> None:
    def work() -> None:
        saver = Saver(tmp_path, kept=(kept := Kept({"a": torch.zeros(3)})))
        saver.save(1)
        kept.value = {"a.b": torch.zeros(4), "a": {"b": 2}}
        for step in (2, 3):
            with pytest.raises(StateError, match="two values in the state are called"):
                saver.save(step)

    alone(work)
    assert commits(tmp_path) == [1]


def test_dicts_and_tuples_of_other_classes_come_back_as_plain_ones() -> None:
    point = collections.namedtuple("point", "x y")
    tree = {"a": collections.OrderedDict(b=1), "c": point(1, 2), "d": collections.Counter("aab")}
    assert list(differences({"a": {"b": 1}, "c": (1, 2), "d": {"a": 2, "b": 1}}, through_json(tree))) == []


def test_values_that_differ_between_ranks_are_refused_by_the_name_of_their_object(tmp_path: Path) -> None:
    """A checkpoint has room for those of one rank, and the others would be lost without a word."""

    def work(rank: int) -> str:
        with pytest.raises(SaveError) as found:
            save(tmp_path, same=Kept(1), kept=Kept({"rank": rank}))
        return str(found.value)

    for message in in_world(2, work):
        assert "the plain values of kept differ between ranks 0 and 1" in message
    assert commits(tmp_path) == []


def test_tensors_of_other_shapes_on_another_rank_are_refused(tmp_path: Path) -> None:
    """Which rank writes which of them follows from their sizes: some would be missing, or another model's."""

    def work(rank: int) -> str:
        with pytest.raises(SaveError) as found:
            save(tmp_path, kept=Kept({"a": torch.zeros(3), "b": torch.zeros(3 + rank)}))
        return str(found.value)

    for message in in_world(2, work):
        assert "the names, types or shapes of the tensors differ between ranks 0 and 1" in message
    assert commits(tmp_path) == []
