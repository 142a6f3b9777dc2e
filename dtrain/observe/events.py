"""What happened in a run, for people and programs.

    <run>/events.jsonl      starts, restores, commits, failures: one JSON object a line, with `time` and `event`
    <run>/metrics.jsonl     loss and logged values of every step; a step that was done again has several lines,
                            of which the last one counts

Both are appended to and never decide anything: a run goes on without them. A process that is killed can leave half a
line, so every reader skips what is no JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
_FLUSH_S = 0.2
_TAIL_BYTES = 1 << 18
"""Of the events, where the newest of a kind is looked for."""


class Events:
    """Appends events to a run folder. Several processes may do so at once."""

    def __init__(self, root: str) -> None:
        self._path = Path(root) / EVENTS

    def emit(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": time.time(), "event": event} | fields) + "\n"
        # One write with O_APPEND: lines of several processes don't mix.
        with contextlib.suppress(OSError):  # a full disk, say, of which the log will speak
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)

    def newest(self, event: str) -> dict[str, Any] | None:
        """The last one of a kind; None if there is none of late."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            found = [line for line in _lines(file.read()) if line.get("event") == event]
            return found[-1] if found else None
        return None

    def touched(self) -> float:
        """When the run has last written to its events or metrics, in Unix time; 0 if it never has."""
        times = [0.0]
        for path in (self._path, self._path.with_name(METRICS)):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    def warn(self, message: str) -> None:
        """Record a warning and show it."""
        self.emit("warning", message=message)
        say(message)


class Metrics:
    """Appends the values of each step; in memory for at most a fifth of a second."""

    def __init__(self, root: str) -> None:
        self._file = (Path(root) / METRICS).open("ab", buffering=1 << 16)
        with contextlib.suppress(OSError):
            whole = (Path(root) / METRICS).read_bytes()[-1:] in (b"", b"\n")
            if not whole:  # a line that was cut off by a kill would swallow the one behind it
                self._file.write(b"\n")
        self._flushed = time.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, "time": time.time()} | values
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(line).encode() + b"\n")
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._file.closed:  # behind the loop, where a run may still be saved
            return
        with contextlib.suppress(OSError):  # what doesn't fit stays in memory for the next time
            self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of one of the files above, oldest first; nothing if it isn't there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    yield from _lines(data)


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def say(message: str) -> None:
    """Show a message to whoever looks on, without breaking into a progress line."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}[dtrain] {message}\n")
    sys.stderr.flush()
