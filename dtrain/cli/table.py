"""What commands print: aligned columns, sizes, ages, a bar for what takes long; and JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from tqdm import tqdm

_GAP = 2
_NARROWEST = 40
_BAR_AFTER_S = 2.0
_UNITS = ("kB", "MB", "GB", "TB", "PB")


def width() -> int | None:
    """Columns of the terminal; None if there is none, and lines are as long as they are."""
    if not sys.stdout.isatty():
        return None
    return max(_NARROWEST, shutil.get_terminal_size().columns)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Columns one beside the other; in a terminal, the last one is shortened in its middle to what room there is.

    :param right: the heads of those that are aligned at the right.
    """
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    room = width()
    for line in lines:
        cells = [
            cell.rjust(size) if name in right else cell.ljust(size)
            for name, cell, size in zip(head, line, widths, strict=True)
        ]
        before = (" " * _GAP).join(cells[:-1]) + " " * _GAP if len(cells) > 1 else ""
        last = cells[-1] if room is None else shortened(cells[-1].rstrip(), room - len(before))
        print((before + last).rstrip())


def shortened(text: str, room: int) -> str:
    """A text without its middle, if it is longer than there is room."""
    room = max(room, 12)
    if len(text) <= room:
        return text
    head = (room - 1) // 2
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_text(count: int) -> str:
    """Bytes in decimal units, three digits of them."""
    if count < 1000:
        return f"{count} B"
    power = 1
    while count >= 999.5 * 1000**power and power < len(_UNITS):
        power += 1
    amount = count / 1000**power
    return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f} {_UNITS[power - 1]}"


def age_text(seconds: float) -> str:
    """In whole units, of which there are two at least, but for the first minute."""
    for unit, length, least in (("d", 86400, 2), ("h", 3600, 2), ("min", 60, 1)):
        if seconds >= least * length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(0, int(seconds))} s"


def local_time(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))


def bar(what: str, total: int) -> tqdm[Any]:
    """Shown on a terminal, once something takes longer than two seconds.

    :param total: in bytes.
    """
    shown: tqdm[Any] = tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=_BAR_AFTER_S,
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
    )
    return shown


def silence_stdout() -> None:
    """After the reader of a pipe has gone: nothing more can be written, and nothing more is said about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
