"""Measuring a model: each sample once, the same numbers on any number of ranks, and no trace of it in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.errors import ConfigError, UsageError
from dtrain.observe.report import growing_gap
from tests.training import opened
from tests.world import alone, errors, in_world

CLASSES, FEATURES = 3, 5


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, (x.sum(1) + torch.randn(count, generator=generator) > 0).long() + (x[:, 0] > 1))


def metrics() -> dict[str, Any]:
    task: dict[str, Any] = {"task": "multiclass", "num_classes": CLASSES}
    macro = {**task, "average": "macro"}
    return {
        "loss": dtrain.Mean(F.cross_entropy),
        "accuracy": torchmetrics.Accuracy(**task),
        "precision": torchmetrics.Precision(**macro),
        "recall": torchmetrics.Recall(**macro),
        "f1": torchmetrics.F1Score(**macro),
        "auroc": torchmetrics.AUROC(**task),
        "confusion": torchmetrics.ConfusionMatrix(**task),
        "wrapped": Wrapped(torchmetrics.Accuracy(**task)),
        "both": torchmetrics.MetricCollection(
            {"a": torchmetrics.Accuracy(**task), "s": torchmetrics.Specificity(**task)}
        ),
    }


class Wrapped:
    """A torchmetrics object that isn't seen from outside."""

    def __init__(self, metric: Any) -> None:
        self._inside = {"metrics": [metric]}

    def update(self, *outputs: Any) -> None:
        self._inside["metrics"][0].update(*outputs)

    def compute(self) -> Any:
        return {"a": self._inside["metrics"][0].compute()}

    def reset(self) -> None:
        self._inside["metrics"][0].reset()


class Plain:
    """Not of torchmetrics: which samples came, in which order."""

    def __init__(self) -> None:
        self.reset()

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.seen += targets.tolist()

    def compute(self) -> Any:
        return torch.tensor(self.seen)

    def reset(self) -> None:
        self.seen: list[int] = []


def network(norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 16), norm(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES))


def train(
    root: Path, *, measure: bool, average: bool = False, norm: type[nn.Module] = nn.BatchNorm1d, **options: Any
) -> tuple[dict[str, Any], list[Any]]:
    """The weights of a small training, and what was measured."""
    with opened(root, **options) as run:
        bare = network(norm)
        model = run.parallelize(bare)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        ema = dtrain.EMA(model, optimizer, decay=0.8)
        data = run.data(samples(40, 1))
        run.track(model=model, optimizer=optimizer, ema=ema)
        found = []
        for step in run.steps(6):
            for x, y in step.micro_batches(data):
                step.backward(F.cross_entropy(model(x), y, reduction="sum"), count=len(y))
            step.update(optimizer, clip=1.0)
            if measure and step.number % 2 == 0:
                torch.manual_seed(step.number)  # even that is undone
                model.eval() if step.number == 4 else model.train()
                held_out = samples(31, 2)
                found.append(run.evaluate(model, held_out, metrics(), average=ema if average else None))
                assert model.training == (step.number != 4)
                model.train()
        weights = {name: getattr(value, "full_tensor", value.clone)() for name, value in bare.state_dict().items()}
    return weights, found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_measurement_is_the_same_on_any_number_of_ranks_and_leaves_no_trace(parallel: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reduction": "exact", "parallel": parallel, "norm": nn.LayerNorm}
    results = []
    for ranks in (1, 2, 3):
        root = tmp_path / str(ranks)
        found = in_world(ranks, lambda rank, root=root: train(root, measure=True, **options))  # type: ignore[misc]
        without = in_world(ranks, lambda rank, root=root: train(root / "no", measure=False, **options))  # type: ignore[misc]
        for (weights, measured), (clean, _) in zip(found, without, strict=True):
            assert_equal(weights, clean)
            results.append(measured)
    for other in results[1:]:
        assert_equal(other, results[0])
    last = results[0][-1]
    assert set(last) == {f"val/{name}" for name in (*metrics(), "both/a", "both/s", "wrapped/a")} - {
        "val/both",
        "val/wrapped",
    }
    assert int(last["val/confusion"].sum()) == 31, "each sample once"
    assert (
        last["val/wrapped/a"]
        == last["val/both/a"]
        == last["val/accuracy"]
        == pytest.approx(float(last["val/confusion"].trace()) / 31)
    )


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_averaged_weights_are_measured_in_the_place_of_the_models(tmp_path: Path) -> None:
    weights, found = alone(lambda: train(tmp_path / "a", measure=True, average=True))
    clean, usual = alone(lambda: train(tmp_path / "b", measure=True))
    assert_equal(weights, clean)
    assert found[-1]["val/loss"] != usual[-1]["val/loss"]
    loaded = network(nn.BatchNorm1d)
    dtrain_load(tmp_path / "a", loaded)
    difference = (loaded[0].weight - weights["0.weight"]).abs().max()
    assert 0 < difference < 0.1, "the average has the names of the model, and lags behind it"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_averaged_weights_that_are_measured_leave_no_trace_in_any_layout(parallel: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"parallel": parallel, "norm": nn.LayerNorm, "shard_size": 2, "snapshot_every": 1000}
    if parallel != "hsdp":
        del options["shard_size"]
    ranks = 4 if parallel == "hsdp" else 2
    found = in_world(ranks, lambda rank: train(tmp_path / "a", measure=True, average=True, **options))
    without = in_world(ranks, lambda rank: train(tmp_path / "b", measure=False, **options))
    for (weights, measured), (clean, _) in zip(found, without, strict=True):
        assert_equal(weights, clean)
        assert_equal(measured, found[0][1])


def dtrain_load(root: Path, model: nn.Module) -> None:
    from dtrain.checkpoint import load

    load(str(root), {"ema": model}, only=["ema.*"], allow_missing=["ema.1.running_*", "ema.1.num_batches_tracked"])


def test_samples_come_once_and_in_order_to_any_metric(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        with opened(tmp_path / str(torch.distributed.get_world_size())) as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            x = torch.randn(19, FEATURES)
            found = run.evaluate(model, TensorDataset(x, torch.arange(19)), {"ids": Plain()}, name="test")
            assert list(found) == ["test/ids"]
            return found["test/ids"].tolist()

    for ranks in (1, 2, 3):
        assert in_world(ranks, work) == [list(range(19))] * ranks


def test_what_is_trained_on_is_not_chosen_by_without_saying_so(tmp_path: Path) -> None:
    def work(best: dtrain.Best) -> Any:
        with opened(tmp_path, keep_best=best) as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            data = samples(40, 1)
            run.data(data)
            return run.evaluate(model, data, {"loss": dtrain.Mean(F.cross_entropy)})

    (refused,) = errors(1, lambda rank: work(dtrain.Best("val/loss")))
    assert isinstance(refused, UsageError)
    assert "this data set is trained on as well" in str(refused)
    assert alone(lambda: work(dtrain.Best("val/loss", on_training=True)))["val/loss"] > 0
    for metric in ("loss", "train/loss"):
        with pytest.raises(ConfigError, match="knows it by heart"):
            dtrain.Best(metric)


def test_samples_that_are_trained_on_as_well_are_counted(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        training, held_out = samples(40, 1), samples(20, 2)
        for column in (0, 1):
            held_out.tensors[column][:7] = training.tensors[column][3:10]
        with opened(tmp_path) as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            run.data(training)
            for _ in range(2):
                run.evaluate(model, held_out, {"loss": dtrain.Mean(F.cross_entropy)})

    in_world(2, work)
    warnings = [line for line in events(tmp_path) if line["event"] == "warning"]
    assert len(warnings) == 1
    assert "val: 7 of its 20 samples are trained on as well (of 40 of the training's" in warnings[0]["message"]


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def test_misuse_is_named(tmp_path: Path) -> None:
    def early(rank: int) -> None:
        with opened(tmp_path / "early") as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            data = run.data(samples(40, 1))
            run.track(model=model, optimizer=optimizer)
            for step in run.steps(1):
                for x, y in step.micro_batches(data):
                    step.backward(F.cross_entropy(model(x), y, reduction="sum"), count=len(y))
                run.evaluate(model, samples(9, 2), {"loss": dtrain.Mean(F.cross_entropy)})

    (error,) = errors(1, early)
    assert "step 1: evaluate comes after step.update" in str(error)

    def no_pair(rank: int) -> None:
        with opened(tmp_path / "pair") as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            run.evaluate(model, TensorDataset(torch.randn(8, FEATURES)), {"loss": dtrain.Mean(F.cross_entropy)})

    (error,) = errors(1, no_pair)
    assert "no pair of inputs and targets; say what metrics are given by outputs=" in str(error)

    def loader(rank: int) -> None:
        with opened(tmp_path / "loader") as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            run.evaluate(model, DataLoader(samples(9, 2)), {"loss": dtrain.Mean(F.cross_entropy)})  # type: ignore[arg-type]

    (error,) = errors(1, loader)
    assert "val: a DataLoader is no map-style data set" in str(error)
    assert "give the data set itself, and not a loader of it" in str(error)

    def bad_shape(rank: int) -> None:
        with opened(tmp_path / "shape") as run:
            model = run.parallelize(nn.Linear(FEATURES, 1))
            run.evaluate(model, samples(8, 1), {"accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=9)})

    (error,) = errors(1, bad_shape)
    assert "evaluate: metric 'accuracy', given torch.float32 of shape (2, 1)" in str(error.__notes__)


def test_a_gap_that_keeps_growing_is_pointed_out(tmp_path: Path) -> None:
    def written(gaps: list[float]) -> str:
        lines = []
        for number, gap in enumerate(gaps, 1):
            lines += [{"step": 2 * number - 1, "loss": 1.0}, {"step": 2 * number, "loss": 0.5, "val/loss": 0.75 + gap}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return growing_gap(tmp_path)

    assert (
        "since step 2 the gap between val/loss and the loss that is trained on keeps growing, from 0 to 0.5"
        in written([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    )
    assert written([0, 0.1, 0.2, 0.1, 0.4, 0.5]) == ""
    assert written([0.1, 0.2, 0.3]) == ""


def test_fit_takes_a_count_that_is_a_tensor_as_an_evaluation_does(tmp_path: Path) -> None:
    def masked(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, mask = F.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch[1] > 0
        return (loss * mask).sum(), mask.sum()

    def work(rank: int) -> tuple[float, float]:
        with opened(tmp_path) as run:
            model = run.parallelize(nn.Linear(FEATURES, CLASSES))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            held_out = samples(20, 2)
            found = dtrain.fit(
                run, model, optimizer, samples(40, 1), loss=dtrain.Mean(), steps=2, outputs=masked, val=held_out
            )
            total, count = masked(model, held_out[:])
            return float(found["val/loss"]), float(total.detach() / count)

    measured, right = in_world(1, work)[0]
    assert measured == pytest.approx(right)


def test_fit_is_the_loop_by_hand(tmp_path: Path) -> None:
    def work(root: Path, fit: bool) -> Any:
        with opened(root) as run:
            bare = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.2), nn.Linear(16, CLASSES))
            model = run.parallelize(bare)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
            loss, held_out = dtrain.Mean(F.cross_entropy), samples(20, 2)
            if fit:
                told: list[int] = []
                found = dtrain.fit(
                    run, model, optimizer, samples(40, 1), loss=loss, epochs=2, schedulers=[schedule], clip=1.0,
                    val=held_out, evaluated=lambda step, values: told.append(step),
                )  # fmt: skip
                assert told == [5, 10]
            else:
                data = run.data(samples(40, 1))
                run.track(model=model, optimizer=optimizer, schedule=schedule)
                for step in run.steps(10):
                    for x, y in step.micro_batches(data):
                        step.backward(F.cross_entropy(model(x), y, reduction="sum"), count=len(y))
                    step.update(optimizer, schedule, clip=1.0)
                    if step.number % 5 == 0:
                        found = run.evaluate(model, held_out, {"loss": loss})
        return {name: value.clone() for name, value in bare.state_dict().items()}, found

    def wrong(**options: Any) -> str:
        def try_it(rank: int) -> None:
            with opened(tmp_path / "wrong") as run:
                model = run.parallelize(nn.Linear(FEATURES, CLASSES))
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                given: dict[str, Any] = {"loss": dtrain.Mean(F.cross_entropy), "epochs": 1} | options
                data = given.pop("data")(run) if "data" in given else samples(40, 1)
                dtrain.fit(run, model, optimizer, data, **given)

        (error,) = errors(1, try_it)
        assert isinstance(error, UsageError), error
        return str(error)

    assert "must be a dtrain.Mean" in wrong(loss=F.cross_entropy)
    assert "epochs='3'" in wrong(epochs="3")
    assert "give one of them" in wrong(steps=3)
    assert "takes metrics by name" in wrong(metrics=[Plain()])
    assert "fit makes run.data itself; give it the data set" in wrong(data=lambda run: run.data(samples(40, 1)))
    assert "outputs gave a Tensor; it gives a tuple" in wrong(outputs=lambda model, batch: model(batch[0]))
    halves = {"loss": dtrain.Mean(), "outputs": lambda model, batch: (model(batch[0]).sum(), torch.tensor(2.5))}
    assert "Mean: it was given a sum over 2.5 terms" in wrong(**halves)
    fitted = in_world(2, lambda rank: work(tmp_path / "fit", True))
    by_hand = in_world(2, lambda rank: work(tmp_path / "hand", False))
    assert_equal(list(map(list, fitted)), list(map(list, by_hand)))
