"""The training loop: what a step computes follows from its place alone, and every finished step can be saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain.errors import UsageError
from dtrain.training.order import permute
from tests.saving import commits
from tests.training import SAMPLES, built, dataset, largest_difference, opened, train
from tests.world import alone, errors, in_world


@pytest.mark.parametrize("counted", [lambda ids: ids >= 0, lambda ids: ids % 3 == 0], ids=["all", "ragged"])
def test_how_a_batch_is_cut_leaves_nothing_but_rounding(
    tmp_path: Path, counted: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weights = [
        in_world(
            ranks,
            lambda rank, size=size, ranks=ranks: train(  # type: ignore[misc]
                tmp_path / f"{size}-{ranks}", 6, micro_batch=size, counted=counted
            ),
        )[0]
        for size, ranks in ((8, 1), (4, 1), (1, 1), (4, 2), (2, 3))
    ]
    assert [difference for w in weights[1:] if (difference := largest_difference(weights[0], w)) > 1e-6] == []
    other = alone(lambda: train(tmp_path / "other", 6, counted=lambda ids: ids % 5 > 0))
    assert largest_difference(weights[0], other) > 1e-4, "the check would see what isn't equal"


def test_a_mean_is_taken_once_over_what_all_ranks_have_counted(tmp_path: Path) -> None:
    """By hand, for one step: micro-batches of 1, 0, 2, ... counted samples on three ranks."""
    seen: list[float] = []

    def work(rank: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
        weights = train(
            tmp_path,
            1,
            counted=lambda ids: ids % 3 == 0,
            seen=lambda run, step: seen.extend([step.loss, step.totals.count]),
        )
        return seen, weights["0.bias"].tolist(), weights

    results = in_world(3, work)
    assert results[0][0] == results[1][0] == results[2][0]
    with alone_reference() as (model, ids, x):
        chosen = x[ids % 3 == 0]
        loss = (model(chosen).squeeze(1) - 1).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        assert results[0][0][1] == len(chosen)
        assert results[0][0][0] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert largest_difference(dict(model.state_dict()), results[0][2]) < 1e-6


@contextmanager
def alone_reference() -> Iterator[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """The model and the first batch of a run with seed 0, without any part of the loop."""
    from dtrain.training.random import derive, set_generators

    set_generators(0, "start")
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 1))
    ids = torch.from_numpy(permute(np.arange(8), SAMPLES, derive(0, "order", 0)))
    yield model, ids, dataset().tensors[0][ids]


Misuse = Callable[[dtrain.Step, Any, nn.Module, dtrain.Data], None]


def _backward_twice(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for x, _ in step.micro_batches(data):
        step.backward(model(x).sum(), count=1)
        step.backward(model(x).sum(), count=1)


def _no_backward(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for _ in step.micro_batches(data):
        pass


def _no_update(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for x, _ in step.micro_batches(data):
        step.backward(model(x).sum(), count=1)


def _part_of_the_batch(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for x, _ in step.micro_batches(data):
        step.backward(model(x).sum(), count=1)
        break
    step.update(optimizer)


def _twice_through(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    _no_update(step, optimizer, model, data)
    _no_update(step, optimizer, model, data)


def _save_before_update(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    _no_update(step, optimizer, model, data)
    saves.pop()()


saves: list[Callable[[], None]] = []


def _loss_of_many(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for x, _ in step.micro_batches(data):
        step.backward(model(x), count=1)


def _nothing_counted(step: dtrain.Step, optimizer: Any, model: nn.Module, data: dtrain.Data) -> None:
    for x, _ in step.micro_batches(data):
        step.backward(model(x).sum(), count=0)
    step.update(optimizer)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_backward_twice, "step 1: call backward once in each pass of step.micro_batches"),
        (_no_backward, "step 1: micro-batch 0 got no step.backward(loss, count=...); every one needs it"),
        (_no_update, "step 1 ended without step.update(optimizer)"),
        (_part_of_the_batch, "step 1: 1 of 4 micro-batches had a backward pass before update; go through"),
        (_twice_through, "step 1: micro_batches was gone through before; do so once a step"),
        (_save_before_update, "step 1: save comes after step.update, when the weights are those after it"),
        (_loss_of_many, "step 1: the loss has shape (2, 1); make it one number, a sum"),
        (_nothing_counted, "step 1: the counts of all micro-batches add up to 0"),
    ],
)
def test_a_loop_that_would_give_wrong_results_is_stopped(tmp_path: Path, misuse: Misuse, message: str) -> None:
    def work(rank: int) -> None:
        with opened(tmp_path) as run:
            model, optimizer, data = built(run)
            saves.append(run.save)
            for step in run.steps(3):
                misuse(step, optimizer, model, data)

    (error,) = errors(1, work)
    assert isinstance(error, UsageError)
    assert str(error).startswith(message)
    assert commits(tmp_path) == []


def test_what_was_updated_before_the_loop_was_left_is_saved(tmp_path: Path) -> None:
    def leave(root: Path, at: int) -> None:
        with opened(root) as run:
            model, optimizer, data = built(run)
            for step in run.steps(9):
                for x, _ in step.micro_batches(data):
                    step.backward((model(x).squeeze(1) - 1).square().sum(), count=len(x))
                step.update(optimizer, clip=1.0)
                if step.number == at:
                    break

    in_world(2, lambda rank: leave(tmp_path / "left", 3))
    assert commits(tmp_path / "left") == [3]
    resumed, undisturbed = (in_world(2, lambda rank, n=n: train(tmp_path / n, 5))[0] for n in ("left", "whole"))  # type: ignore[misc]
    assert largest_difference(resumed, undisturbed) == 0.0


def test_a_save_inside_the_loop_is_of_the_step_whose_update_is_done(tmp_path: Path) -> None:
    def save_at(step: int, save: bool) -> Callable[[dtrain.Run, dtrain.Step], None]:
        def seen(run: dtrain.Run, current: dtrain.Step) -> None:
            if save and current.number == step:
                run.save()
                raise KeyboardInterrupt  # the rest of the step never happens

        return seen

    errors(2, lambda rank: train(tmp_path / "saved", 6, seen=save_at(3, True)))
    assert commits(tmp_path / "saved") == [3]
    resumed, undisturbed = (in_world(2, lambda rank, n=n: train(tmp_path / n, 6))[0] for n in ("saved", "whole"))  # type: ignore[misc]
    assert largest_difference(resumed, undisturbed) == 0.0


def test_a_restored_model_is_in_training_mode_and_has_its_dropout(tmp_path: Path) -> None:
    modes: list[bool] = []

    def work() -> tuple[list[bool], dict[str, torch.Tensor]]:
        train(tmp_path, 2, dropout=0.5)
        with opened(tmp_path) as run:
            model, _, _ = built(run, dropout=0.5)
            for _ in run.steps(3):
                modes.extend(module.training for module in model.modules())
                break
        return modes, train(tmp_path, 4, dropout=0.5)

    modes, resumed = alone(work)
    assert modes == [True] * 4
    undisturbed = alone(lambda: train(tmp_path / "whole", 4, dropout=0.5))
    assert largest_difference(resumed, undisturbed) == 0.0


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(3, 7, [3, 6, 7]), ("2 steps", 4, [2, 4]), ("1 epoch", 12, [5, 10, 12]), ("2 epochs", 11, [10, 11])],
)
def test_checkpoints_come_after_so_many_steps_or_epochs_and_at_the_end(
    tmp_path: Path, every: int | str, steps: int, expected: list[int]
) -> None:
    in_world(2, lambda rank: train(tmp_path, steps, save_every=every, keep_last=9))
    assert commits(tmp_path) == expected


def test_checkpoints_come_after_so_many_seconds_by_the_clock_of_one_rank(tmp_path: Path) -> None:
    in_world(
        2, lambda rank: train(tmp_path, 12, save_every="0.4s", keep_last=9, seen=lambda run, step: time.sleep(0.1))
    )
    found = commits(tmp_path)
    assert found[-1] == 12
    assert 3 <= len(found) <= 5
    assert all(later - earlier >= 3 for earlier, later in pairwise(found[:-1])), found


def test_a_stop_that_one_rank_asks_for_ends_all_after_the_same_step_and_saves_it(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        last = 0

        def seen(run: dtrain.Run, step: dtrain.Step) -> None:
            nonlocal last
            last = step.number
            if rank == 1 and step.number == 3:
                run.stop()

        train(tmp_path, 50, seen=seen)
        return last

    assert in_world(3, work) == [4, 4, 4]
    assert commits(tmp_path) == [4]


def test_a_run_that_is_already_done_trains_and_saves_nothing_more(tmp_path: Path) -> None:
    first = alone(lambda: train(tmp_path, 3))
    again = alone(lambda: train(tmp_path, 3))
    assert largest_difference(first, again) == 0.0
    assert commits(tmp_path) == [3]


def test_a_scaled_loss_trains_like_an_unscaled_one_and_its_scale_grows(tmp_path: Path) -> None:
    def work() -> tuple[dict[str, torch.Tensor], float]:
        with opened(tmp_path / "scaled") as run:
            model, optimizer, data = built(run)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
            run.track(scaler=scaler)
            for step in run.steps(4):
                for x, _ in step.micro_batches(data):
                    step.backward((model(x).squeeze(1) - 1).square().sum(), count=len(x))
                step.update(optimizer, clip=1.0)
        return dict(model.state_dict()), scaler.get_scale()

    weights, scale = alone(work)
    assert scale == 16.0
    assert largest_difference(weights, alone(lambda: train(tmp_path / "plain", 4))) < 1e-6
