"""Who holds a run folder, as far as its events tell: whoever takes it over is told if somebody may still be at it.

    {"event": "claimed", "epoch": 3, "host": "node-7", "pid": 4711, "machine": "...", "job": "..."}
    {"event": "released", "epoch": 3}

Nothing is decided by it. That is the log's to do: whoever held the folder before can't commit any more.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from dtrain.checkpoint.log import Log
from dtrain.checkpoint.machine import alive, machine
from dtrain.observe.events import Events

_RECENT_S = 60.0
"""Who has left a sign of life since, on another machine, may be alive."""


def claimed(events: Events, epoch: int) -> None:
    """Tell that this process holds the folder now."""
    events.emit("claimed", epoch=epoch, host=socket.gethostname(), pid=os.getpid(), machine=machine(), job=_job())


def released(events: Events, epoch: int) -> None:
    """Tell that nobody of this epoch will write any more."""
    events.emit("released", epoch=epoch)


def holder(events: Events, log: Log) -> str:
    """Who may be at the run as it is taken over, in a sentence; empty if nobody is."""
    last, over = events.newest("claimed"), events.newest("released")
    ended = over is not None and over["epoch"] == log.epoch
    if last is None or last["epoch"] != log.epoch or ended or last["pid"] == os.getpid():
        return ""
    if _job() and last["job"] == _job():  # torchrun has formed a group of its own job anew
        return ""
    sign = max([events.touched(), *(entry.time for entry in log.entries[-1:])])
    here = last["machine"] == machine()
    if not alive(last["pid"]) if here else time.time() - sign > _RECENT_S:
        return ""
    when = f"{max(0.0, time.time() - sign):.0f} s ago, at {time.strftime('%H:%M:%S', time.localtime(sign))}"
    who = f"epoch {log.epoch} of this run (host {last['host']}, process {last['pid']})"
    does = "is still alive" if here else "may still be alive"
    return f"{who} {does}: its last sign of life was {when}. This start takes the run over, and the other one stops"


def _job(environment: Mapping[str, str] = os.environ) -> str:
    """What torchrun calls the job, and the store that it is known by; empty without torchrun."""
    job = environment.get("TORCHELASTIC_RUN_ID", "")
    return f"{job}@{environment.get('DTRAIN_STORE', '')}" if job else ""
