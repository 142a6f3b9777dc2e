"""A second start on a run folder: who takes over a run that is alive is told so, and nobody else is."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from dtrain.checkpoint import holder
from dtrain.checkpoint.log import Log
from dtrain.observe.events import EVENTS, Events, read_lines
from dtrain.storage.local import LocalStorage
from tests.saving import warnings
from tests.scripts import run, started


def claim(root: Path) -> dict[str, object]:
    return [line for line in read_lines(root / EVENTS) if line["event"] == "claimed"][-1]


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_start_on_a_live_run_names_who_it_takes_it_from_and_that_one_stops(tmp_path: Path, ranks: int) -> None:
    with started(tmp_path, "--steps", 100_000, "--step-s", 0.01, "--save-every", 5, ranks=ranks) as first:
        first.wait_for(lambda: first.steps() >= 10)
        held = claim(tmp_path)
        with started(tmp_path, "--steps", 100_000, "--step-s", 0.01, "--save-every", 5, ranks=ranks) as second:
            second.wait_for(lambda: second.steps() >= 10)
            assert first.end().code == 1
            assert "epoch 2 took over; epoch 1 is a leftover and stops without writing any more" in first.err()
            who = (
                rf"epoch 1 of this run \(host {socket.gethostname()}, process {held['pid']}\) is still alive: its last "
            )
            when = (
                r"sign of life was \d s ago, at \d\d:\d\d:\d\d\. This start takes the run over, and the other one stops"
            )
            assert re.search(rf"\[dtrain\] {who}{when}", second.err()), second.err()


def test_a_start_after_an_end_or_a_kill_has_nobody_to_name(tmp_path: Path) -> None:
    assert run(tmp_path, "--steps", 2).code == 0
    with started(tmp_path, "--steps", 100_000, "--step-s", 0.01, ranks=2) as program:
        program.wait_for(lambda: program.steps() >= 4)
        os.killpg(program.pid, signal.SIGKILL)
    assert run(tmp_path, "--steps", 4, "--kill-supervisor-at", 3, ranks=2, torchrun=("--max-restarts=3",)).code == 0
    assert [text for text in warnings(tmp_path) if "of this run" in text] == []


def test_another_machine_counts_as_alive_for_a_minute_unless_its_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, log = Events(str(tmp_path)), Log(LocalStorage(str(tmp_path)))
    assert holder.holder(events, log) == ""
    log.claim(time.time(), "a")
    there = {"epoch": 1, "host": "node-7", "pid": 1, "machine": "another", "job": ""}
    events.emit("claimed", **there)
    named = "epoch 1 of this run (host node-7, process 1) may still be alive: its last sign of life was 0 s ago"
    assert holder.holder(events, log).startswith(named)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "train")
    events.emit("claimed", **there | {"job": "train@"})
    assert holder.holder(events, log) == "", "torchrun has formed the group anew"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert holder.holder(events, log) != ""
    later = time.time() + 61
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        assert holder.holder(events, log) == ""
    holder.released(events, 1)
    assert holder.holder(events, log) == ""
