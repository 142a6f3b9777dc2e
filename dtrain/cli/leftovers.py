"""`dtrain checkpoint gc`: what killed processes have left in a run folder. Used through `checkpoint`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dtrain.checkpoint.catalog import ABANDONED_S, CHECKPOINTS, epoch_of
from dtrain.checkpoint.log import Log
from dtrain.cli.table import print_json, print_table, size_text
from dtrain.cli.transfer import RunArg, StorageOptions, open_run
from dtrain.config import Interval
from dtrain.errors import ConfigError
from dtrain.storage.base import Distant, Storage


class _Leftover(NamedTuple):
    path: str
    bytes: int
    changed: float
    reason: str
    remove: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Gc:
    """List what killed processes have left in a run folder; with --delete, delete it.

    That is: attempts of earlier epochs that were never committed, folders of checkpoints that the log has retired,
    half-made files, and on a bucket uploads of earlier epochs that were never finished. Never a checkpoint, and nothing
    of the newest epoch, whose run may be alive.
    """

    folder: RunArg

    grace: str = f"{ABANDONED_S / 60:.0f}m"
    """Only what was last written to before this time, such as 90s, 10m or 2h: somebody may still be at work on the
    rest."""

    delete: bool = False
    """Delete it."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: a list of {path, bytes, reason, deleted}."""

    def run(self) -> int:
        grace = Interval.parse(self.grace, "--grace")
        if grace.unit != "seconds":
            raise ConfigError(f"--grace {self.grace}: give a time, such as 90s, 10m or 2h")
        storage, log = open_run(self.folder, self.storage_option)
        before = time.time() - grace.amount
        found = [left for left in _leftovers(storage, log) if left.changed < before]
        if self.delete:
            for left in found:
                left.remove()
        stays = {left.path for left in _leftovers(storage, log)} if self.delete and found else set()
        rows = [
            {
                "path": left.path,
                "bytes": left.bytes,
                "reason": left.reason,
                "deleted": self.delete and left.path not in stays,
            }
            for left in found
        ]
        if self.json:
            print_json(rows)
            return 0
        if rows:
            print_table(
                ["size", "why", "deleted" if self.delete else "can be deleted"],
                [[size_text(left.bytes), left.reason, left.path] for left in found],
                right=("size",),
            )
            total = size_text(sum(left.bytes for left in found))
            print(f"{total} deleted" if self.delete else f"{total} in all; --delete deletes it")
        else:
            print("nothing is left over")
        if log.broken:
            print(f"attempts are kept as long as the log can't be read: {log.broken[0]}")
        if any(row["deleted"] != self.delete for row in rows):
            print("some of it could not be deleted; look at the permissions")
        return 0


def _leftovers(storage: Storage, log: Log) -> Iterator[_Leftover]:
    whole = {entry.attempt for entry in (*log.commits(), *log.bad())}
    retired = {entry.attempt for entry in log.entries if entry.kind == "retire"}
    # As long as the log can't be read, any attempt may be the one whose commit that is.
    for name in storage.names(CHECKPOINTS) if not log.broken else ():
        if name in whole or not (name in retired or 0 <= epoch_of(name) < log.epoch):
            continue
        path = f"{CHECKPOINTS}/{name}"
        files = storage.files(path).values()
        if not files and isinstance(storage, Distant):
            continue  # some servers list a folder that is empty now
        yield _Leftover(
            path,
            sum(file.bytes for file in files),
            max((file.changed for file in files), default=0.0),
            "retired" if name in retired else "never committed",
            partial(storage.remove, path),
        )
    for half in storage.half_made():
        folder, _, rest = half.path.partition("/")
        # In a bucket there may be other people's uploads, and those of runs that lie further down.
        older = folder == CHECKPOINTS and 0 <= epoch_of(rest.partition("/")[0]) < log.epoch
        if older or not isinstance(storage, Distant):
            yield _Leftover(half.path, half.bytes, half.changed, "half-made", half.remove)
