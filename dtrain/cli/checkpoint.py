"""`dtrain checkpoint ls | show | diff | gc`: look at the checkpoints of a run folder.

They only read, but for `gc --delete`, and may be used while the run goes on: what it deletes in the meantime is told as
deleted. With `--json` they print one JSON value, whose keys stay: see each command's help.

Exit codes: 0 is fine, 1 is a difference or damage, 2 is an error in what was asked for.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from tyro.extras import SubcommandApp

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.compare import compare, plain_values
from dtrain.checkpoint.format import MANIFEST, Manifest
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.newest import newest_good, still_there
from dtrain.checkpoint.reader import read_manifest
from dtrain.checkpoint.tree import dtype_named, tensor_names
from dtrain.cli.best import Best
from dtrain.cli.leftovers import Gc
from dtrain.cli.table import age_text, local_time, plural, print_json, print_table, shortened, size_text, width
from dtrain.cli.transfer import Export, Import, RunArg, StorageOptions, Verify, commit_at, open_run
from dtrain.errors import Damaged
from dtrain.observe.events import say
from dtrain.storage.base import Storage

_MOST_SHOWN = 40
"""Lines of a list, unless a pattern asks for more."""
_WIDE = 100
"""Columns from which on attempts are shown by their folder's whole name."""


def app() -> SubcommandApp:
    """The group of commands."""
    group = SubcommandApp()
    for name, command in (
        ("ls", List),
        ("show", Show),
        ("verify", Verify),
        ("diff", Diff),
        ("export", Export),
        ("import", Import),
        ("gc", Gc),
        ("best", Best),
    ):
        group.command(name=name)(command)
    return group


@dataclass(frozen=True, kw_only=True)
class List:
    """List the checkpoints of a run, the newest last.

    `good` means that its manifest and the sizes of its files are right; `dtrain checkpoint verify` reads the rest too.
    The size is that of all its files.
    """

    folder: RunArg

    all: bool = False
    """Show deleted checkpoints too."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: a list of {step, epoch, time, ranks, bytes, attempt, state, reason}. The state is good, bad, damaged
    or retired; ranks and bytes are null where nobody knows them any more."""

    def run(self) -> int:
        storage, log = open_run(self.folder, self.storage_option)
        states = states_of(log)
        rows = [self._row(storage, log, e, *states[e.attempt]) for e in log.entries if e.kind == "commit"]
        rows = [row for row in rows if self.all or row["state"] != "retired"]
        if self.json:
            print_json(rows)
            return 0
        if not rows:
            print(f"{self.folder} has no checkpoint")
            return 0
        room = width()
        now = time.time()
        print_table(
            ["step", "epoch", "committed", "ago", "ranks", "size", "attempt", "state"],
            [
                [
                    str(row["step"]),
                    str(row["epoch"]),
                    local_time(row["time"]),
                    age_text(now - row["time"]),
                    "-" if row["ranks"] is None else str(row["ranks"]),
                    "-" if row["bytes"] is None else size_text(row["bytes"]),
                    row["attempt"] if room is None or room >= _WIDE else row["attempt"].rpartition(".")[2],
                    row["state"],
                ]
                for row in rows
            ],
            right=("step", "epoch", "ago", "ranks", "size"),
        )
        for row in rows:
            if row["reason"]:
                print(f"step {row['step']} is {row['state']}: {row['reason']}")
        for broken in log.broken:
            print(f"{broken}; what it said is unknown")
        return 0

    def _row(self, storage: Storage, log: Log, entry: Entry, state: str, reason: str) -> dict[str, Any]:
        ranks, size = entry.world_size or None, entry.bytes or None
        if state != "retired":
            try:
                data, manifest = read_manifest(storage, f"{CHECKPOINTS}/{entry.attempt}", MANIFEST, entry.manifest)
                ranks, size = manifest.world_size, sum(manifest.files.values()) + len(data)
            except Damaged as error:
                log.refresh()  # a run that goes on may just have deleted it
                if states_of(log)[entry.attempt][0] == "retired":
                    state = "retired"
                elif state == "good":
                    state, reason = "damaged", str(error)
        return {
            "step": entry.step,
            "epoch": entry.epoch,
            "time": entry.time,
            "ranks": ranks,
            "bytes": size,
            "attempt": entry.attempt,
            "state": state,
            "reason": reason,
        }


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show what is in a checkpoint: its objects, tensors, plain values, and which rank wrote how much."""

    folder: RunArg

    step: int | None = None
    """Which checkpoint. By default the newest good one."""

    tensors: str | None = None
    """Show all tensors whose names fit this pattern, such as '*.weight'."""

    values: str | None = None
    """Show all plain values whose names fit this pattern."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: {step, epoch, time, attempt, torch, ranks, objects: [{name, tensors, elements, bytes, values}],
    files: [{file, bytes, chunks}], values: {name: text}, tensors: [{name, dtype, shape, bytes,
    chunks: [{file, offset, length, offsets, sizes}]}]}."""

    def run(self) -> int:
        storage, log = open_run(self.folder, self.storage_option)
        if self.step is None:
            commit, manifest, passed_over = newest_good(storage, log)
            for text in passed_over:
                say(text)
        else:
            commit = commit_at(self.folder, log, self.step)
            manifest = _manifest(storage, commit)
        tensors = [t for t in _tensors(manifest) if fnmatch.fnmatchcase(t["name"], self.tensors or "*")]
        values = {k: v for k, v in plain_values(manifest).items() if fnmatch.fnmatchcase(k, self.values or "*")}
        objects, files = list(_objects(manifest)), list(_files(manifest))
        if self.json:
            print_json(
                {
                    "step": commit.step,
                    "epoch": commit.epoch,
                    "time": commit.time,
                    "attempt": commit.attempt,
                    "torch": manifest.torch,
                    "ranks": manifest.world_size,
                    "objects": objects,
                    "files": files,
                    "values": values,
                    "tensors": tensors,
                }
            )
            return 0
        print(f"step {commit.step}, epoch {commit.epoch}, committed {local_time(commit.time)}")
        print(f"{plural(manifest.world_size, 'rank')}, torch {manifest.torch}, {CHECKPOINTS}/{commit.attempt}\n")
        print_table(
            ["tensors", "elements", "bytes", "values", "object"],
            [
                [f"{o['tensors']:,}", f"{o['elements']:,}", size_text(o["bytes"]), f"{o['values']:,}", o["name"]]
                for o in objects
            ],
            right=("tensors", "elements", "bytes", "values"),
        )
        print()
        print_table(
            ["chunks", "bytes", "file"],
            [[f"{f['chunks']:,}", size_text(f["bytes"]), f["file"]] for f in files],
            right=("chunks", "bytes"),
        )
        # Who asks for some of the tensors or of the values alone gets these alone.
        shown = _first(list(values.items()), self.values) if self.values or not self.tensors else []
        if shown:
            print()
            cut = width() is not None
            print_table(["value", ""], [[shortened(name, 40) if cut else name, value] for name, value in shown])
            _and_more(len(values) - len(shown), "--values '*'")
        if self.values is not None and not values:
            print(f"\nno plain value is called {self.values}")
        rows = _first(tensors, self.tensors) if self.tensors or not self.values else []
        if rows:
            print()
            print_table(
                ["dtype", "shape", "bytes", "chunks", "tensor"],
                [
                    [
                        t["dtype"],
                        "x".join(map(str, t["shape"])) or "scalar",
                        size_text(t["bytes"]),
                        str(len(t["chunks"])),
                        t["name"],
                    ]
                    for t in rows
                ],
                right=("bytes", "chunks"),
            )
            _and_more(len(tensors) - len(rows), "--tensors '*'")
        if self.tensors is not None and not tensors:
            print(f"\nno tensor is called {self.tensors}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two checkpoints of a run by their digests, without reading their tensors.

    The exit code is 0 if they are equal, 1 if not.
    What was cut in another way, by another number of ranks say, can't be compared by digests, and counts as different.
    """

    folder: RunArg

    old: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="A")]
    """The step of one checkpoint."""

    new: Annotated[tyro.conf.Positional[int], tyro.conf.arg(metavar="B")]
    """The step of the other one."""

    all: bool = False
    """List everything that differs, however long the list is."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: {equal, changed, only_old, only_new, unknown: [name], reshaped, values: {name: [old, new]}}. Unknown
    are tensors that were cut in another way."""

    def run(self) -> int:
        storage, log = open_run(self.folder, self.storage_option)
        old, new = (_manifest(storage, commit_at(self.folder, log, step)) for step in (self.old, self.new))
        found = compare(old, new)
        if self.json:
            print_json(asdict(found))
            return int(bool(found))
        kinds = {
            "changed": found.changed,
            "another type or shape": list(found.reshaped),
            f"only in step {self.old}": found.only_old,
            f"only in step {self.new}": found.only_new,
            "cut in another way": found.unknown,
        }
        counts = [f"{len(found.equal):,} equal"] + [f"{len(names):,} {what}" for what, names in kinds.items() if names]
        print(f"tensors: {', '.join(counts)}")
        rows = [[what, name] for what, names in kinds.items() for name in names if what != "another type or shape"]
        rows += [[f"{before} -> {now}", name] for name, (before, now) in found.reshaped.items()]
        shown = rows if self.all else rows[:_MOST_SHOWN]
        if shown:
            print_table(["tensor is", "name"], shown)
            _and_more(len(rows) - len(shown), "--all")
        if found.unknown:
            print("What was cut in another way can't be compared by digests; compare exports of the two.")
        changes = [
            [name, f"{'nothing' if before is None else before} -> {'nothing' if now is None else now}"]
            for name, (before, now) in found.values.items()
        ]
        print(f"values: {len(changes):,} changed")
        if changes:
            shown = changes if self.all else changes[:_MOST_SHOWN]
            print_table(["value", "old -> new"], shown)
            _and_more(len(changes) - len(shown), "--all")
        return int(bool(found))


def states_of(log: Log) -> dict[str, tuple[str, str]]:
    """What the log says of each commit, by its attempt: good, bad or retired; and why."""
    found = {entry.attempt: ("good", "") for entry in log.entries if entry.kind == "commit"}
    found |= {entry.attempt: ("bad", entry.reason) for entry in log.bad()}
    return found | {entry.attempt: ("retired", "") for entry in log.entries if entry.kind == "retire"}


def _manifest(storage: Storage, commit: Entry) -> Manifest:
    """:raises Damaged: it isn't the one that was committed, or a file is missing or has another size."""
    folder = f"{CHECKPOINTS}/{commit.attempt}"
    with still_there(storage, folder):
        return read_manifest(storage, folder, MANIFEST, commit.manifest)[1]


def _tensors(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for name in tensor_names(manifest.tree):
        item = manifest.tensors[name]
        chunks = [{f: getattr(c, f) for f in ("file", "offset", "length", "offsets", "sizes")} for c in item.chunks]
        size = math.prod(item.shape) * dtype_named(item.dtype).itemsize
        yield {"name": name, "dtype": item.dtype, "shape": item.shape, "bytes": size, "chunks": chunks}


def _objects(manifest: Manifest) -> Iterator[dict[str, Any]]:
    tensors = list(_tensors(manifest))
    values = plain_values(manifest)
    for name in manifest.tree:
        own = [t for t in tensors if t["name"] == name or t["name"].startswith(f"{name}.")]
        yield {
            "name": name,
            "tensors": len(own),
            "elements": sum(math.prod(t["shape"]) for t in own),
            "bytes": sum(t["bytes"] for t in own),
            "values": sum(key == name or key.startswith(f"{name}.") for key in values),
        }


def _files(manifest: Manifest) -> Iterator[dict[str, Any]]:
    chunks = Counter(chunk.file for item in manifest.tensors.values() for chunk in item.chunks)
    for file, size in manifest.files.items():
        yield {"file": file, "bytes": size, "chunks": chunks[file]}


def _first(rows: list[Any], pattern: str | None) -> list[Any]:
    return rows if pattern is not None else rows[:_MOST_SHOWN]


def _and_more(count: int, option: str) -> None:
    if count:
        print(f"... and {count:,} more: {option} lists them")
