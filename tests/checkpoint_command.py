"""`dtrain checkpoint ...` in the test's own process, and a run folder for it, as fixtures."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.cli.main import main
from tests.saving import Kept, Saver
from tests.world import in_world

Dtrain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dtrain(capsys: pytest.CaptureFixture[str]) -> Iterator[Dtrain]:
    """Runs `dtrain checkpoint ...` in this process: exit code, output, errors."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["checkpoint", *map(str, arguments)])
        return (exit.value.code, *capsys.readouterr())  # type: ignore[return-value]

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def save_steps(root: Path, keep_last: int = 3) -> None:
    """Steps 10, 20 and 30 by two ranks, of which 20 and 30 differ in one tensor and some plain values."""

    def work(rank: int) -> None:
        made, kept = model(), Kept({"rate": 0.5, "names": ["a"], "nan": float("nan")})
        saver = Saver(root, keep_last, model=made, kept=kept)
        saver.save(10)
        saver.save(20)
        with torch.no_grad():
            made[0].get_parameter("bias").add_(1)
        kept.value = {"rate": 0.25, "names": ["a"], "nan": float("nan"), "new": (1, None)}
        saver.save(30)

    in_world(2, work)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_steps(tmp_path / "run")
    return tmp_path / "run"
