"""The examples, started as a user would start them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.log import Log
from dtrain.checkpoint.policy import best_of
from dtrain.criteria import Best
from dtrain.storage.places import storage_at
from tests.jobs import PATIENCE_S, ROOT, read_lines


def command(module: str, folder: Path, *options: object, ranks: int = 1) -> dict[str, Any]:
    """What subprocess takes to start an example."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    program = [*torchrun, f"dtrain.examples.{module}", "--dir", str(folder), *map(str, options)]
    return {
        "args": [sys.executable, "-m", *program],
        "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder.parent)},
        "text": True,
    }


def run(module: str, folder: Path, *options: object, ranks: int = 1) -> str:
    """What an example prints."""
    given = command(module, folder, *options, ranks=ranks)
    done = subprocess.run(**given, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


def values(folder: Path, name: str = "loss") -> list[float]:
    """What was measured in each step, where it was. A step that was done again counts as it was done last."""
    lines = {line["step"]: line for line in read_lines(folder / "metrics.jsonl")}
    assert sorted(lines) == list(range(1, len(lines) + 1))
    return [line[name] for _, line in sorted(lines.items()) if name in line]


def best(folder: Path, metric: str) -> list[tuple[int, dict[str, float]]]:
    """The best checkpoints, by step, with all that was measured."""
    log = Log(storage_at(str(folder)))
    log.refresh()
    return [(entry.step, entry.metrics) for entry in best_of(log.commits(), Best(metric, mode="max", k=3))]


def test_the_gpt_learns_the_same_with_all_its_flags_and_another_number_of_ranks(tmp_path: Path) -> None:
    # fmt: off
    flags = (
        "--steps", 6, "--layers", 2, "--width", 32, "--heads", 2, "--context", 32, "--reduction", "exact",
        "--parallel", "fsdp", "--precision", "bf16", "--activation-checkpointing", "selective", "--evaluate-every", 3,
    )
    # fmt: on
    one, three = tmp_path / "one", tmp_path / "three"
    run("gpt", one, *flags)
    run("gpt", three, *flags, "--workers", 1, ranks=3)
    losses = values(one)
    assert values(three) == losses
    assert losses[-1] < losses[0]
    measured = values(one, "val/perplexity")
    assert len(measured) == 2
    assert measured[1] < measured[0]
    assert values(three, "val/perplexity") == measured


def test_digits_that_are_killed_and_go_on_with_two_ranks_come_to_the_same_best_models(tmp_path: Path) -> None:
    flags = ("--epochs", 4, "--reduction", "exact")
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert "best: step " in run("digits", alone, *flags)
    with subprocess.Popen(**command("digits", killed, *flags), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not best(killed, "val/accuracy"):  # the first epoch is in the log
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert len(values(killed)) < len(values(alone))
    run("digits", killed, *flags, "--workers", 1, "--parallel", "hsdp", ranks=2)
    assert values(killed) == values(alone)
    found = best(alone, "val/accuracy")
    assert best(killed, "val/accuracy") == found
    assert len(found) == 3
    assert found[0][1]["val/accuracy"] > 0.93


def test_cancer_is_found_the_same_by_one_and_by_two_ranks(tmp_path: Path) -> None:
    flags = ("--epochs", 12, "--reduction", "exact")
    alone = run("cancer", tmp_path / "one", *flags)
    assert run("cancer", tmp_path / "two", *flags, ranks=2) == alone
    table = alone[alone.index("test set") :].splitlines()
    (_, true_negative, false_positive), (_, false_negative, true_positive) = (line.split() for line in table[1:3])
    assert int(true_negative) + int(false_positive) == 72
    assert int(true_positive) / (int(true_positive) + int(false_negative)) > 0.8
    again = run("cancer", tmp_path / "one", *flags)  # there is nothing left to train
    assert again == alone[alone.index("best: step") :]


def test_the_digits_are_learned_in_one_process_whose_libraries_have_threads(tmp_path: Path) -> None:
    given = command("digits", tmp_path, "--epochs", 1)
    del given["env"]["OMP_NUM_THREADS"]
    done = subprocess.run(**given, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(values(tmp_path)) == 22


def test_a_flag_that_can_not_be_right_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="shard_size=1 must be 2 ranks or more, with parallel='hsdp'"):
        run("gpt", tmp_path / "bad", "--shard-size", 1)


@pytest.mark.parametrize(("module", "missing"), [("digits", "torchmetrics"), ("cancer", "sklearn")])
def test_a_package_that_is_missing_is_named_with_what_brings_it(tmp_path: Path, module: str, missing: str) -> None:
    (tmp_path / f"{missing}.py").write_text("raise ImportError")
    given = command(module, tmp_path / "run")
    given["env"]["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    done = subprocess.run(**given, capture_output=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "pip install 'dtrain[examples]'" in done.stderr.splitlines()[-1]
