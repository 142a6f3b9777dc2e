"""What is taken for garbage, and what becomes of it, in the ranks' own processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dtrain
from dtrain.elastic.failure import GoBack
from dtrain.errors import Garbage, Unreliable, UsageError
from tests.training import built, dataset, opened
from tests.world import alone, errors, in_world

Spoil = Callable[[int, int, torch.Tensor], torch.Tensor]
"""Given a rank, a step and a loss: another loss."""


def train(
    root: Path,
    *,
    steps: int = 8,
    pass_over: int = 0,
    clip: float | None = None,
    spoil: Spoil | None = None,
    constant: bool = False,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The weights after some steps. :param constant: of a model with a buffer that nothing changes."""
    with opened(root, **options) as run:
        model, optimizer, data = built(run, dropout=0.1, constant=constant)
        if pass_over:
            run._loop._skipped.add(pass_over)
        for step in run.steps(steps):
            for x, _ in step.micro_batches(data):
                loss = (model(x).squeeze(1) - 1).square().sum()
                step.backward(loss if spoil is None else spoil(run.rank, step.number, loss), count=len(x))
            step.update(optimizer, clip=clip)
        weights = [value for model in run._parallel.models for value in model.module.parameters()]
    return {str(number): getattr(value, "full_tensor", value.clone)().detach() for number, value in enumerate(weights)}


def at(step: int, rank: int, factor: float) -> Spoil:
    return lambda mine, now, loss: loss * factor if (now, mine) == (step, rank) else loss


def events(root: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (root / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] in kinds]


@pytest.mark.parametrize(
    ("parallel", "ranks", "clip"),
    [("ddp", 1, None), ("ddp", 2, None), ("ddp", 3, 1.0), ("fsdp", 2, None), ("fsdp", 3, 1.0), ("fsdp", 3, None)],
)
def test_a_step_that_is_skipped_is_as_if_its_samples_were_not_there(
    parallel: str, ranks: int, clip: float | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"parallel": parallel, "clip": clip, "constant": (parallel, ranks) == ("fsdp", 3)}
    guards = dtrain.Guards(nonfinite="skip")

    def work(rank: int) -> dict[str, torch.Tensor]:
        return train(tmp_path / "spoilt", spoil=at(5, ranks - 1, torch.inf), guards=guards, **options)

    spoilt = in_world(ranks, work)
    clean = in_world(ranks, lambda rank: train(tmp_path / "clean", pass_over=5, **options))
    for mine, theirs in zip(spoilt, clean, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (found,) = events(tmp_path / "spoilt", "skipped")
    assert (found["step"], len(found["samples"]["data"])) == (5, 8)
    assert f"the loss is inf; it comes from rank {ranks - 1} (" in found["reason"]
    assert found["reason"].endswith("3"), "the last micro-batch of the list is among that rank's"
    lines = [json.loads(line) for line in (tmp_path / "spoilt" / "metrics.jsonl").read_text().splitlines() if line]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 6, 7, 8]
    assert [line["step"] for line in lines if line.get("skipped")] == [5]


def test_too_many_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        guards = dtrain.Guards(nonfinite="skip", most_in_a_row=2)
        return train(
            tmp_path, spoil=lambda mine, now, loss: loss * torch.nan if now in (2, 4, 5, 6) else loss, guards=guards
        )

    for error in errors(2, work):
        assert isinstance(error, Garbage)
        assert "step 6: the loss is nan" in str(error)
        assert "after 2 steps in a row that were left out" in str(error)
        assert "or allow for more of them than Guards(most_in_a_row=2)" in str(error)
    assert [event["step"] for event in events(tmp_path, "skipped")] == [2, 4, 5]


def test_a_loss_that_jumps_is_said_or_gone_back_from(tmp_path: Path) -> None:
    jumping: dict[str, Any] = {"steps": 14, "spoil": at(12, 1, 1e4)}
    in_world(2, lambda rank: train(tmp_path / "warn", **jumping))
    found, *_ = events(tmp_path / "warn", "spike")  # what follows from it jumps as well
    assert found["step"] == 12
    assert found["score"] > 12
    guards = dtrain.Guards(loss_spike="rollback")
    for error in errors(2, lambda rank: train(tmp_path / "back", guards=guards, **jumping)):
        assert isinstance(error, GoBack), "which ends the generation"
        assert error.over == 12
        assert "deviations above the 11 before" in str(error)
    in_world(2, lambda rank: train(tmp_path / "off", guards=dtrain.Guards(loss_spike="off"), **jumping))
    assert events(tmp_path / "off", "spike") == []


def test_what_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path, save_every=2) as run:
            model, optimizer, data = built(run)
            for step in run.steps(6):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(x))
                step.update(optimizer)
                if step.number == 4:
                    with torch.no_grad():
                        next(iter(model.parameters()))[0] = torch.inf

    for error in errors(2, work):
        assert isinstance(error, Garbage)
        assert "step 4: module.0.weight isn't finite, and this state is not saved" in str(error)
    assert [event["step"] for event in events(tmp_path, "committed")] == [2]


def test_off_is_off(tmp_path: Path) -> None:
    guards = dtrain.Guards(nonfinite="off", loss_spike="off", compare_every=None)
    weights = alone(lambda: train(tmp_path, steps=3, spoil=at(2, 0, torch.nan), guards=guards))
    assert not torch.isfinite(weights["0"]).any()


@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 2), ("hsdp", 4), ("fsdp", 2)])
def test_copies_that_differ_are_found_under_ddp_and_hsdp(parallel: str, ranks: int, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        guards = dtrain.Guards(compare_every=2)
        with opened(tmp_path, parallel=parallel, shard_size=2 if parallel == "hsdp" else None, guards=guards) as run:
            model, optimizer, data = built(run)
            for step in run.steps(6):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(x))
                step.update(optimizer)
                if step.number == 3 and rank == 1:
                    parameter = next(iter(model.parameters()))
                    local = getattr(parameter, "_local_tensor", parameter)
                    local.detach().view(-1).view(torch.int32)[2] ^= 1

    if parallel == "fsdp":  # each has another part
        in_world(ranks, work)
        return
    for error in errors(ranks, work):
        assert isinstance(error, GoBack)
        assert "the copies of the parameters differ after step 4" in str(error)


def restored(root: Path, spoil: Spoil | None = None, **options: Any) -> Any:
    return train(root, steps=6, spoil=spoil, guards=dtrain.Guards(verify_restore=True), **options)


def test_the_first_step_after_a_restore_is_computed_twice_and_compared(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        train(tmp_path / str(dist.get_world_size()), steps=3)
        return restored(tmp_path / str(dist.get_world_size()))

    clean = in_world(2, lambda rank: train(tmp_path / "clean", steps=6))
    for mine, theirs in zip(in_world(2, work), clean, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), "it leaves no trace"

    def unreliable(rank: int) -> Any:
        train(tmp_path / "bad", steps=3)
        calls = iter(range(10**6))

        def spoil(mine: int, now: int, loss: torch.Tensor) -> torch.Tensor:
            return loss * (1 + 1e-3 * (next(calls) if (mine, now) == (1, 4) else 0))

        return restored(tmp_path / "bad", spoil)

    for error in errors(2, unreliable):
        assert isinstance(error, Unreliable)
        assert "step 4 was computed twice after the restore" in str(error)


def test_evaluation_in_a_step_that_is_computed_twice_counts_once(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def update(self, *_: Any) -> None: ...
        def reset(self) -> None: ...

        def compute(self) -> float:
            return 1.0

    def work(steps: int, verify: bool) -> list[float]:
        early = dtrain.EarlyStop("val/m", patience=50)
        guards = dtrain.Guards(verify_restore=verify)
        with opened(tmp_path, early_stop=early, guards=guards) as run:
            model, optimizer, data = built(run)
            for step in run.steps(steps):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(x))
                step.update(optimizer)
                held_out = [(torch.ones(4), torch.ones(1))] * 4
                run.evaluate(model, held_out, {"m": Counting()})
            return [run._loop._saves.selection._without]

    assert alone(lambda: work(3, verify=False)) == [2]
    assert alone(lambda: work(5, verify=True)) == [4]


def test_averaged_weights_in_the_place_of_the_models_are_not_saved(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            model, optimizer, data = built(run)
            ema = dtrain.EMA(model, optimizer, decay=0.5)
            run.track(ema=ema)
            for step in run.steps(2):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(x))
                step.update(optimizer)
                with ema.applied():
                    run.save()

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert "a checkpoint inside of ema.applied() would hold the averaged weights" in str(error)


def test_a_checkpoint_before_the_measurement_of_a_step_does_not_hide_it(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        with opened(tmp_path, keep_best=dtrain.Best("val/m")) as run:
            model, optimizer, data = built(run)
            for step in run.steps(3):
                for x, _ in step.micro_batches(data):
                    step.backward(model(x).square().sum(), count=len(x))
                step.update(optimizer)
                if step.number == 2:
                    run.save()
                    mean = {"m": dtrain.Mean(lambda outputs, targets, reduction: outputs.sum())}
                    run.evaluate(model, [(torch.ones(4), torch.ones(1))] * 4, mean)
            return run.best

    found = in_world(2, work)
    assert found[0] == found[1]
    assert found[0][0] == 2
    log = [json.loads(path.read_text())["entry"] for path in sorted((tmp_path / "log").glob("*.json"))]
    assert [(entry["step"], "val/m" in entry["metrics"]) for entry in log if entry["kind"] == "commit"] == [
        (2, False),
        (2, True),
        (3, False),
    ]


def test_a_step_that_is_skipped_is_so_for_all_its_optimizers(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        with opened(tmp_path, guards=dtrain.Guards(nonfinite="skip")) as run:
            nets = [run.parallelize(torch.nn.Linear(4, 1)) for _ in range(2)]
            optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
            data = run.data(dataset())
            run.track(a=nets[0], b=nets[1], oa=optimizers[0], ob=optimizers[1])
            before = torch.empty(0)
            for step in run.steps(3):
                for x, _ in step.micro_batches(data):
                    broken = torch.nan if step.number == 3 else 1.0
                    step.backward(nets[0](x).square().sum() * broken + nets[1](x).square().sum(), count=len(x))
                if step.number == 3:
                    before = torch.cat([p.detach().reshape(-1) for p in nets[1].parameters()])
                for optimizer in optimizers:
                    step.update(optimizer)
            return before, torch.cat([p.detach().reshape(-1) for p in nets[1].parameters()])

    before, after = alone(lambda: work(0))
    assert torch.equal(before, after)


def test_a_metric_that_is_gone_by_has_to_be_measured_and_an_average_tracked(tmp_path: Path) -> None:
    def work(metric: str, track: bool) -> None:
        with opened(tmp_path / metric.replace("/", "-"), keep_best=dtrain.Best(metric)) as run:
            model, optimizer, _ = built(run)
            ema = dtrain.EMA(model, optimizer)
            if track:
                run.track(ema=ema)
            held_out = [(torch.ones(4), torch.ones(1))] * 4
            run.evaluate(model, held_out, {"loss": dtrain.Mean(torch.nn.functional.mse_loss)}, average=ema)

    in_world(1, lambda rank: work("valid/loss", True))
    (error,) = errors(1, lambda rank: work("val/los", True))
    assert "evaluate(name='val') measures val/loss, and keep_best goes by 'val/los'" in str(error)
    (error,) = errors(1, lambda rank: work("val/loss", False))
    assert "evaluate(average=...): that isn't tracked, and would begin anew after a failure" in str(error)
