"""`dtrain checkpoint gc`: what killed processes have left in a run folder. Used through `checkpoint`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoint.catalog import CHECKPOINTS, epoch_of
from dtrain.checkpoint.log import FOLDER, Log
from dtrain.cli.table import print_json, print_table, size_text
from dtrain.cli.transfer import RunArg, open_run
from dtrain.storage.local import LocalStorage

_ABANDONED_S = 600.0
"""A half-made file of this age belongs to a process that is gone."""


@dataclass(frozen=True, kw_only=True)
class Gc:
    """List what killed processes have left in a run folder; with --delete, delete it.

    That is: attempts of earlier epochs that were never committed, folders of checkpoints that the log has retired, and
    half-made files older than ten minutes. Never a checkpoint, and nothing of the newest epoch, whose run may be alive.
    """

    folder: RunArg

    delete: bool = False
    """Delete it."""

    json: bool = False
    """Print JSON: a list of {path, bytes, reason, deleted}."""

    def run(self) -> int:
        storage, log = open_run(self.folder)
        if log.broken:
            # Any attempt may be the one whose commit can't be read.
            found = list(_half_made(self.folder))
        else:
            found = [*_leftovers(self.folder, storage, log), *_half_made(self.folder)]
        rows: list[dict[str, Any]] = []
        for path, reason in found:
            size = _bytes_in(path)
            if self.delete:
                if path.is_dir():
                    storage.remove(str(path.relative_to(self.folder)))
                else:
                    path.unlink(missing_ok=True)
            name = str(path.relative_to(self.folder))
            rows.append({"path": name, "bytes": size, "reason": reason, "deleted": self.delete and not path.exists()})
        if self.json:
            print_json(rows)
            return 0
        if rows:
            print_table(
                ["size", "why", "deleted" if self.delete else "can be deleted"],
                [[size_text(row["bytes"]), row["reason"], row["path"]] for row in rows],
                right=("size",),
            )
            total = size_text(sum(row["bytes"] for row in rows))
            print(f"{total} deleted" if self.delete else f"{total} in all; --delete deletes it")
        else:
            print("nothing is left over")
        if log.broken:
            print(f"attempts are kept as long as the log can't be read: {log.broken[0]}")
        if any(row["deleted"] != self.delete for row in rows):
            print("some of it could not be deleted; look at the folder's permissions")
        return 0


def _leftovers(folder: Path, storage: LocalStorage, log: Log) -> Iterator[tuple[Path, str]]:
    whole = {entry.attempt for entry in (*log.commits(), *log.bad())}
    retired = {entry.attempt for entry in log.entries if entry.kind == "retire"}
    for name in storage.names(CHECKPOINTS):
        if name in retired:
            yield folder / CHECKPOINTS / name, "retired"
        elif name not in whole and 0 <= epoch_of(name) < log.epoch:
            yield folder / CHECKPOINTS / name, "never committed"


def _half_made(folder: Path) -> Iterator[tuple[Path, str]]:
    for place in (folder, folder / FOLDER):
        for path in sorted(place.glob(".*.half")):
            if path.is_file() and time.time() - path.stat().st_mtime > _ABANDONED_S:
                yield path, "half-made"


def _bytes_in(path: Path) -> int:
    files = [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    return sum(file.stat().st_size for file in files)
