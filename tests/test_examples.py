"""The examples, started as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT


def run(module: str, folder: Path, *options: object, ranks: int = 1, threads: str = "1") -> list[float]:
    """The losses of an example's run."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *torchrun, f"dtrain.examples.{module}", "--dir", str(folder), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder.parent)}
    if not threads:
        del environment["OMP_NUM_THREADS"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_the_gpt_learns_the_same_with_all_its_flags_and_another_number_of_ranks(tmp_path: Path) -> None:
    # fmt: off
    flags = (
        "--steps", 6, "--layers", 2, "--width", 32, "--heads", 2, "--context", 32, "--reduction", "exact",
        "--parallel", "fsdp", "--precision", "bf16", "--activation-checkpointing", "selective",
    )
    # fmt: on
    alone = run("gpt", tmp_path / "one", *flags)
    assert run("gpt", tmp_path / "three", *flags, "--workers", 1, ranks=3) == alone
    assert alone[-1] < alone[0]


def test_the_digits_are_learned_the_same_by_one_and_by_two_ranks(tmp_path: Path) -> None:
    flags = ("--epochs", 3, "--reduction", "exact")
    alone = run("digits", tmp_path / "one", *flags)
    assert run("digits", tmp_path / "two", *flags, "--workers", 1, "--parallel", "hsdp", ranks=2) == alone
    found, again = (
        [json.loads(line).get("val/accuracy") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert found == again
    assert found[-1] > 0.8


def test_the_digits_are_learned_in_one_process_whose_libraries_have_threads(tmp_path: Path) -> None:
    assert len(run("digits", tmp_path, "--epochs", 1, threads="")) == 22


def test_a_flag_that_can_not_be_right_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="shard_size=1 must be 2 ranks or more, with parallel='hsdp'"):
        run("gpt", tmp_path / "bad", "--shard-size", 1)
