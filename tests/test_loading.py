"""Loading without a run: which checkpoint is taken, which differences are errors, what patterns choose."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from dtrain.checkpoint import Reader, Writer, load, loading, newest
from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.reader import load_tensors, read_manifest
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint, StateError, UsageError
from dtrain.storage.local import LocalStorage
from tests.saving import Kept, Saver, bits, delete, differences, folder_of
from tests.steps_of_a_run import flip, make, objects
from tests.world import Raised, alone, errors, in_world
from tests.written import manifest_of, only_chunk, write


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


def test_what_the_run_deletes_while_it_is_opened_gives_way_to_its_newest(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def found_then_deleted(*asked: Any) -> Any:
        delete(copy, 2)
        return read_manifest(*asked)

    monkeypatch.setattr(newest, "read_manifest", found_then_deleted)
    with warnings.catch_warnings(action="error"):
        assert load(copy, made(9)).step == 1
    with pytest.raises(ConfigError, match=r"has deleted its checkpoint of step 2; there are: 1$"):
        load(copy, made(9), step=2)


def test_the_best_can_be_asked_of_a_run_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere doesn't exist"):
        load(tmp_path / "nowhere", made(9), step="best")
    torch.save(tree(made(2)), tmp_path / "saved.pt")
    with pytest.raises(ConfigError, match=r"step=best can be asked of a run folder only, and .*saved\.pt is none"):
        load(tmp_path / "saved.pt", made(9), step="best")


def test_damage_outside_of_a_run_is_damage_whatever_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(Damaged, match="cut off"), newest.still_there(LocalStorage(str(tmp_path)), "."):
        raise Damaged("cut off")


def test_weights_beside_a_folder_of_logs_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "loss.json").write_text("{}")
    save_file(dict(made(2)["model"].state_dict()), tmp_path / "model.safetensors")
    objects = made(9)
    assert len(load(tmp_path, {"model": objects["model"]}).tensors) == 4
    assert list(differences(tree(made(2))["model"], tree(objects)["model"])) == []
    (tmp_path / "log" / "00000000.json").write_text("{}")
    with pytest.raises(NoGoodCheckpoint, match="has no good checkpoint"):
        load(tmp_path, made(9))


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_the_run_deletes_while_it_is_loaded_is_not_called_damaged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def deleted_then_loaded(*asked: Any, **more: Any) -> int:
        if not dist.is_initialized() or dist.get_rank() == 0:
            delete(copy, 2)
        return load_tensors(*asked, **more)

    monkeypatch.setattr(loading, "load_tensors", deleted_then_loaded)
    for error in errors(ranks, lambda rank: load(copy, made(9))):
        assert isinstance(error, ConfigError)
        assert str(error).endswith(f"{copy}: the run has deleted step 2 while it was read; ask for a newer one")


def test_a_step_or_patterns_of_another_kind_are_named_with_what_is_taken(run: Path) -> None:
    with pytest.raises(UsageError, match="step='latest': give a number or 'best'; without a step it is the newest"):
        load(run, made(9), step="latest")  # type: ignore[arg-type]
    for option in ("only", "skip", "allow_missing", "allow_unexpected", "allow_reshaped", "allow_retyped"):
        with pytest.raises(UsageError, match=rf"{option}=True: {option} takes patterns, such as \['model.head"):
            load(run, made(9), **{option: True})  # type: ignore[arg-type]


def test_of_a_step_that_was_committed_twice_the_good_copy_is_loaded(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])

    def before_the_first_is_deleted() -> None:
        saver = Saver(tmp_path, **objects(20))
        saver.saver.tidy = lambda: None  # type: ignore[method-assign]
        saver.save(20)

    alone(before_the_first_is_deleted)
    (folder_of(tmp_path, 20) / "__0_0.distcp").unlink()
    for step in (20, None):
        model = nn.Linear(5, 3)
        with pytest.warns(UserWarning, match="checkpoint of step 20 is damaged and passed over: .* is missing"):
            assert load(tmp_path, {"model": model}, step=step).step == 20
        assert torch.equal(model.weight, objects(20)["model"].weight)


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
        ({"only": ["kept"]}, ["kept.at"]),
        ({"only": "mod?l", "skip": "*.weight"}, ["model.encoder.bias", "model.head.bias"]),
        ({"skip": ["optimizer", "model", "kept"]}, []),
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


def test_an_object_may_be_named_for_all_that_it_has(run: Path) -> None:
    objects = made(9)
    assert len(load(run, {"model": objects["model"]}, only=["model"]).tensors) == 4
    assert list(differences(tree(made(2))["model"], tree(objects)["model"])) == []
    assert load(run, {"model": other_model(), "kept": Kept()}, skip="model").tensors == ("kept.at",)
    allowed: dict[str, Any] = {f"allow_{kind}": "model" for kind in DIFFERENCES}
    assert load(run, {"model": other_model()}, **allowed).tensors == ("model.encoder.bias",)
    assert load(run, {"model": made(9)["model"]}, skip="optimizer").left == ()
    with pytest.raises(StateError, match="only='optimizer' matches nothing in "):
        load(run, {"model": made(9)["model"]}, only="optimizer")


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


def with_one_beside(seed: int) -> dict[str, Any]:
    """As `made`, with another module, and an optimizer of its own, beside the model."""
    held = made(seed)
    other = nn.Linear(3, 4)
    stepped = torch.optim.AdamW(other.parameters(), lr=0.01 * seed)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    return held | {"other": other, "other_optimizer": stepped}


def test_a_model_and_its_optimizer_are_loaded_whatever_was_tracked_beside_them(run: Path, tmp_path: Path) -> None:
    alone(lambda: write(tmp_path, 2, **with_one_beside(2)))
    expected, objects = tree(with_one_beside(2)), made(9)
    del objects["kept"]
    assert load(tmp_path, objects).step == 2
    assert list(differences({name: expected[name] for name in objects}, tree(objects))) == []
    objects = with_one_beside(9)
    part = {"model": objects["model"], "optimizer": objects["optimizer"]}
    load(tmp_path, part, only=["model", "optimizer.state.model.head.*"])
    state = objects["optimizer"].state_dict()["state"]
    for index, source in enumerate((made(9), made(9), made(2), made(2))):
        assert list(differences(tree(source)["optimizer"]["state"][index], state[index])) == []
    # And the other way round: a run that tracked one, loaded beside another.
    before, objects = tree(with_one_beside(9)), with_one_beside(9)
    load(run, objects, allow_missing=["other", "other_optimizer"])
    for name, value in tree(objects).items():
        assert list(differences((before if name.startswith("other") else expected)[name], value)) == []


def test_an_optimizer_follows_its_model_beside_others(tmp_path: Path) -> None:
    alone(lambda: write(tmp_path, 2, **with_one_beside(2)))
    objects = made(9, names=("encoder", "extra"))
    del objects["kept"]
    with pytest.raises(StateError) as caught:
        load(tmp_path, objects)
    assert "optimizer: " not in str(caught.value)
    load(tmp_path, objects, allow_missing="model.extra.*", allow_unexpected="model.head.*")
    saved, fresh = made(2)["optimizer"].state_dict(), made(9, names=("encoder", "extra"))["optimizer"].state_dict()
    for index, source in enumerate((saved, saved, fresh, fresh)):
        assert list(differences(source["state"][index], objects["optimizer"].state_dict()["state"][index])) == []


def test_an_optimizer_of_which_the_parameters_were_numbered_is_refused(tmp_path: Path) -> None:
    torch.save(tree(made(2)), tmp_path / "saved.pt")
    objects = made(9)
    with pytest.raises(StateError, match="optimizer: 0 left group 0"):
        load(tmp_path / "saved.pt", {"model": objects["model"], "optimizer": objects["optimizer"]})
    assert list(differences(tree(made(9))["model"], tree(objects)["model"])) == []


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
    objects = change(made(9))
    with pytest.raises(StateError) as caught:
        load(run, objects)
    assert message in str(caught.value)
    if "model" in objects:
        assert list(differences(tree(made(9))["model"], tree(objects)["model"])) == [], "nothing has changed"


def test_an_option_may_be_had_of_another_kind_of_optimizer(run: Path) -> None:
    objects = made(9)
    optimizer = torch.optim.SGD(objects["model"].parameters())
    part = {"model": objects["model"], "optimizer": optimizer}
    load(run, part, only=["model", "optimizer.param_groups.0.lr"])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.2, 0)
    assert list(differences(tree(made(2))["model"], tree(objects)["model"])) == []


def test_the_state_of_another_kind_of_optimizer_is_refused_whatever_is_left_of_its_options(run: Path) -> None:
    objects = made(9)
    optimizer = torch.optim.SGD(objects["model"].parameters())
    with pytest.raises(StateError, match="saved by another kind of optimizer"):
        load(run, {"model": objects["model"], "optimizer": optimizer}, skip=["optimizer.param_groups.*.lr"])
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == (1e-3, 0)
    assert list(differences(tree(made(9))["model"], tree(objects)["model"])) == [], "nothing has changed"


def test_options_that_an_older_torch_did_not_save_are_filled_in(run: Path, tmp_path: Path) -> None:
    older = made(2)
    for name in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del older["optimizer"].param_groups[0][name]
    alone(lambda: write(tmp_path, 2, **older))
    objects = made(9)
    load(tmp_path, objects)
    assert objects["optimizer"].param_groups[0].keys() == made(9)["optimizer"].param_groups[0].keys()
    assert objects["optimizer"].param_groups[0]["lr"] == 0.2


class Filling(torch.optim.SGD):
    """Knows a value for what its state was saved without."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("momentum", 0.5)
            group.setdefault("dampening", 0.0)


def test_an_optimizer_of_somebody_elses_may_fill_in_what_it_was_saved_without(run: Path) -> None:
    objects = made(9)
    optimizer = Filling(objects["model"].parameters())
    load(run, {"model": objects["model"], "optimizer": optimizer})
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.2, 0.5)


def test_more_than_twenty_differences_are_counted(run: Path) -> None:
    objects = made(9, names=tuple(f"layer{number}" for number in range(30)))
    with pytest.raises(StateError, match=r"\n  \.\.\. and 44 more\n"):
        load(run, {"model": objects["model"]})


@pytest.mark.parametrize(
    ("of_rank_1", "kind", "message"),
    [
        (lambda run: load(run, {"model": nn.Linear(7, 7)}), StateError, "rank 1: the objects are not what was saved"),
        (lambda run: load(run, {"a.b": made(9)["model"]}), UsageError, "rank 1: track('a.b'): a name has no dots"),
        (lambda run: load(run, {1: Kept()}), UsageError, "rank 1: track(1): a name is a text"),  # type: ignore[dict-item]
        (lambda run: out_of_reach(lambda: load(run, {"model": made(9)["model"]})), OSError, "rank 1: [Errno 13] not"),
    ],
)
def test_what_one_rank_meets_is_raised_by_all_at_once(
    run: Path, of_rank_1: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    before = bits(made(9)["model"].head.weight)

    def work(rank: int) -> None:
        model = made(9)["model"]
        try:
            of_rank_1(run) if rank else load(run, {"model": model})
        finally:
            assert kind is OSError or bits(model.head.weight) == before

    for error in errors(2, work, timeout_s=10):
        assert type(error) is kind
        assert str(error).startswith(message)


def out_of_reach(work: Callable[[], object]) -> object:
    """Do it on a disk of which no tensor can be read."""

    def read_into(*args: object) -> None:
        raise PermissionError(errno.EACCES, "not yours", "file")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "read_into", read_into)
        return work()


@pytest.mark.parametrize("only", [(), ["optimizer"]])
def test_what_is_on_the_meta_device_is_refused_and_loaded_once_it_has_memory(run: Path, only: list[str]) -> None:
    with torch.device("meta"):
        model = nn.Module()
        model.encoder, model.head = nn.Linear(3, 4), nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(StateError, match=r"weight.*: on the meta device, .* module.to_empty\(device=...\)"):
        load(run, {"model": model, "optimizer": optimizer}, only=only)
    model.to_empty(device="cpu")
    load(run, {"model": model})
    assert list(differences(tree(made(2))["model"], dict(model.state_dict()))) == []


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


def test_a_writer_that_is_given_other_tensors_than_it_tells_of_says_what_to_give(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.ones(3)}, "": {"a": torch.ones(2)}}

    def save(folder: str, whole: bool) -> None:
        writer = Writer(tmp_path, folder, state, step=1)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state if whole else writer.state_dict, storage_writer=writer, planner=planner)

    with pytest.raises(Raised, match=r"one: dcp\.save was given no tensor model\.weight, .* give it writer.state"):
        alone(lambda: save("one", whole=True))
    assert not (tmp_path / "one" / MANIFEST).exists()
    alone(lambda: save("two", whole=False))
    found = {"model": {"weight": torch.zeros(3)}, "": {"a": torch.zeros(2)}}
    dcp.load(found, storage_reader=Reader.open(tmp_path / "two"), no_dist=True)
    assert list(differences(state, found)) == []


def test_a_tensor_that_was_named_but_not_saved_is_an_error_and_not_an_empty_one(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints/step-00000001.e1.0", copy)
    manifest = json.loads((copy / MANIFEST).read_bytes()) | {"tensors": {}, "files": {}}
    del manifest["digest"]  # as one from before there was any
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StateError, match=r"model\.encoder\.weight: named in the checkpoint, but not saved with it"):
        load(copy, {"kept": Kept()})


@pytest.mark.parametrize("step", ["7", None, 1.5, -1, True])
def test_a_step_that_is_no_number_of_steps_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(UsageError, match=rf"Writer\(step={step!r}\): give the number of optimizer steps"):
        Writer(tmp_path, "one", {}, step=step)


def test_dcp_is_told_of_a_type_that_differs_instead_of_a_silent_cast(run: Path) -> None:
    def work() -> None:
        state = {"model": {"head.bias": torch.zeros(4, dtype=torch.float64)}}
        dcp.load(state, storage_reader=Reader.open(run))

    with pytest.raises(Exception, match=r"model\.head\.bias: saved as float32, to be loaded into float64"):
        alone(work)


def test_dcp_saves_into_no_folder_that_is_there_already(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        writer = Writer(tmp_path, "step-7", {"w": torch.ones(2)}, step=7)
        dcp.save(writer.state_dict, storage_writer=writer, planner=dcp.DefaultSavePlanner(flatten_state_dict=False))

    alone(lambda: work(0))
    before = sorted(tmp_path.rglob("*"))
    for error in errors(2, work):
        assert f"UsageError: {tmp_path}/step-7 is there already; give another name" in str(error)
    assert sorted(tmp_path.rglob("*")) == before
