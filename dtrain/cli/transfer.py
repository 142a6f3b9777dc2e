"""`dtrain checkpoint verify | export | import`: what reads all of a checkpoint. Used through `checkpoint`."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dtrain.checkpoint.adopt import adopt
from dtrain.checkpoint.interchange import SHARD_BYTES, export_weights
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.newest import still_there
from dtrain.checkpoint.source import Source
from dtrain.checkpoint.sources import open_source
from dtrain.checkpoint.tree import dtype_named
from dtrain.checkpoint.verify import size_of, verify, verify_log
from dtrain.cli.table import bar, plural, print_json, shortened, size_text, width
from dtrain.errors import ConfigError, NoGoodCheckpoint
from dtrain.observe.events import say
from dtrain.storage.base import Storage
from dtrain.storage.places import is_remote, on_disk, storage_at

StorageOptions = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        metavar="NAME=VALUE",
        help="How a URL is reached, as `Config.storage_options` has it: endpoint_url=http://host:9000, region=..., "
        "profile=..., path_style=true. Once for each option.",
        help_behavior_hint="",
    ),
]
RunArg = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help="The run folder, or its URL.")]
_GB = 1_000_000_000
_PATIENCE_S = 20.0
"""With a server that doesn't answer."""
_TEXTS = ("client", "endpoint_url", "region", "profile")
"""Options that are text even where they look like a number, as a profile's name may."""


def reached(given: Sequence[str], *places: str) -> dict[str, Any]:
    """How places are reached: the options that were given as NAME=VALUE.

    :raises ConfigError: one has another form, or no place is a URL.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--storage-option {text}: give NAME=VALUE, such as endpoint_url=http://host:9000")
        options[name] = value
        if name not in _TEXTS:
            with contextlib.suppress(ValueError):  # numbers, true and false
                options[name] = json.loads(value)
    if options and not any(map(is_remote, map(on_disk, places))):
        raise ConfigError(f"--storage-option {given[0]} is for a URL, and {places[0]} is none; leave it out")
    return options


def open_run(folder: str, storage_option: Sequence[str] = ()) -> tuple[Storage, Log]:
    """:raises ConfigError: it is no run folder."""
    folder = on_disk(folder)
    # Somebody sits in front of it.
    patience = {"timeout_s": _PATIENCE_S} if folder.startswith("s3://") else {}
    storage = storage_at(folder, patience | reached(storage_option, folder))
    log = Log(storage)
    log.refresh()
    if not log.entries and not log.broken and not (Path(folder) / FOLDER).is_dir():
        there = storage.names(".")
        what = f"is no run folder: it has no {FOLDER}/ in it" if there or Path(folder).exists() else "doesn't exist"
        raise ConfigError(f"{folder} {what}; give the `dir` of a run")
    return storage, log


def commit_at(folder: str, log: Log, step: int | None) -> Entry:
    """The newest commit of a step, whether good or bad; without a step, the newest good one, if there is any.

    :raises ConfigError: there is none of this step.
    :raises NoGoodCheckpoint: there is none at all.
    """
    there = log.commits() or log.found_bad()
    if step is not None:
        there = sorted([*log.commits(), *log.found_bad()], key=lambda entry: entry.number)
        known = ", ".join(str(known) for known in sorted({entry.step for entry in there})) or "none"
        deleted = any(e.kind == "retire" and e.step == step for e in log.entries)
        there = [entry for entry in there if entry.step == step]
        if not there:
            what = f"deleted its checkpoint of step {step}" if deleted else f"has no checkpoint of step {step}"
            raise ConfigError(f"{folder} {what}; there are: {known}")
    if not there:
        raise NoGoodCheckpoint(f"{folder} has no good checkpoint")
    return there[-1]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of a checkpoint and of the log, and name each that isn't as it was saved.

    The exit code is 1 if there is any.
    """

    folder: RunArg

    step: int | None = None
    """Which checkpoint. By default the newest good one."""

    all: bool = False
    """All checkpoints, also those known to be bad."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: {checkpoints: [{step, attempt, bytes, seconds, deleted, faults}], log: [fault]}. A fault is
    {file, start, stop, name, what}, with the range of bytes and the tensor's name."""

    def run(self) -> int:
        if self.all and self.step is not None:
            raise ConfigError(f"--all and --step {self.step} together: give one of them")
        storage, log = open_run(self.folder, self.storage_option)
        faults = verify_log(storage, log)
        wanted: list[Entry] = []
        if self.all:
            whole = {entry.attempt for entry in (*log.commits(), *log.bad())}
            wanted = [entry for entry in log.entries if entry.kind == "commit" and entry.attempt in whole]
        elif self.step is not None or log.commits() or log.found_bad() or not faults:
            wanted = [commit_at(self.folder, log, self.step)]
        found: list[dict[str, Any]] = []
        with bar("verify", sum(size_of(storage, entry) for entry in wanted)) as progress:
            for entry in wanted:
                verdict = verify(storage, log, entry, progress.update)
                found.append({"step": entry.step, "attempt": entry.attempt, **_fields(verdict)})
                if not self.json:
                    progress.clear()
                    _tell(entry, found[-1])
        if self.json:
            print_json({"checkpoints": found, "log": [_fields(fault) for fault in faults]})
        else:
            print(f"log: {'good' if not faults else plural(len(faults), 'fault')}, {len(log.entries):,} entries")
            for fault in faults:
                _tell_fault(_fields(fault))
        return int(bool(faults) or any(row["faults"] for row in found))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint's weights in a form that other programs read.

    Every byte is checked on the way, and the memory that it takes doesn't depend on the size of the model. What is
    written appears when it is whole.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A run folder, or whatever `import` takes."""

    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")]
    """Its name tells the form: NAME.safetensors, or NAME.pt for torch.load, or a folder, which gets
    model.safetensors, in several files with an index if it is large."""

    step: int | None = None
    """Which checkpoint of a run. By default the newest good one."""

    object: str = "model"
    """The name that the run tracks the model by. Its tensors are written without it."""

    all: bool = False
    """Write all of the state, each tensor with its object's name."""

    shard_gb: float = SHARD_BYTES / _GB
    """The most that a file in a folder holds, in GB (10⁹ bytes)."""

    force: bool = False
    """Replace what an earlier export has written there."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: {files, tensors, bytes, left_out, converted}."""

    def run(self) -> int:
        if not 0 < self.shard_gb * _GB < math.inf:
            raise ConfigError(f"--shard-gb {self.shard_gb}: give a number above 0, such as 5")
        destination = Path(on_disk(self.destination))
        if re.match(r"\w+:/", str(destination)):
            raise ConfigError(f"{destination}: an export goes to a disk; copy it from there")
        options = reached(self.storage_option, self.source)
        source = _opened(self.source, step=self.step, name=self.object, storage_options=options)
        started = time.monotonic()
        size = _bytes_of(source, "" if self.all else self.object)
        with still_there(source.storage, source.folder), bar("export", size) as progress:
            done = export_weights(
                source,
                destination,
                name=None if self.all else self.object,
                shard_bytes=int(self.shard_gb * _GB),
                force=self.force,
                progress=progress.update,
            )
        if self.json:
            print_json(_fields(done) | {"files": [str(file) for file in done.files]})
            return 0
        print(
            f"{plural(done.tensors, 'tensor')}, {_speed(done.bytes, time.monotonic() - started)}, from {source.place}"
        )
        for file in done.files:
            print(file)
        if done.left_out:
            print(f"left out, since safetensors holds tensors only: {_some(done.left_out)}")
        if done.converted:
            print(f"numpy values written as tensors and numbers: {_some(done.converted)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run folder whose checkpoint of step 0 is somebody else's weights, with digests from then on.

    The source is safetensors (a file, its folder, or the index of several), a file of torch.save, a folder that stock
    torch.distributed.checkpoint has saved, or a run folder. Safetensors and runs may also be named by their URLs.
    Nothing in it is run: what needs more than tensors and plain values is refused by name. What the source holds
    besides the weights is named, and left out.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Where the weights are."""

    folder: RunArg
    """The run folder to make."""

    object: str = "model"
    """The name that the run tracks its model by."""

    key: str = ""
    """Where in the source the weights are, such as 'state_dict' or 'checkpoint.model'."""

    step: int | None = None
    """Which checkpoint, if the source is a run folder. By default the newest good one."""

    storage_option: StorageOptions = ()

    json: bool = False
    """Print JSON: {folder, bytes, left_out}."""

    def run(self) -> int:
        options = reached(self.storage_option, self.source, self.folder)
        key = self.key or self.object
        source = _opened(self.source, step=self.step, name=key, storage_options=options)
        started = time.monotonic()
        size = _bytes_of(source, key)
        with still_there(source.storage, source.folder), bar("import", size) as progress:
            folder = adopt(
                source, self.folder, name=self.object, key=key, storage_options=options, progress=progress.update
            )
        left_out = source.besides(key)
        if self.json:
            print_json({"folder": folder, "bytes": size, "left_out": left_out})
            return 0
        print(f"{self.folder}/{folder}: {_speed(size, time.monotonic() - started)}, from {source.place}")
        if left_out:
            print(f"left out, as it isn't in {key}: {_some(left_out)}")
        return 0


def _opened(path: str, **asked: Any) -> Source:
    """See `open_source`."""
    source = open_source(path, **asked)
    for text in source.passed_over:
        say(text)
    return source


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass, with its faults as dicts too."""
    fields = dict(vars(value))
    if "faults" in fields:
        fields["faults"] = [_fields(fault) for fault in fields["faults"]]
    return fields


def _bytes_of(source: Source, name: str) -> int:
    return sum(
        dtype_named(item.dtype).itemsize * _count(item.shape)
        for key, item in source.manifest.tensors.items()
        if not name or key.startswith(f"{name}.")
    )


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _tell(entry: Entry, row: dict[str, Any]) -> None:
    if row["deleted"]:
        print(f"step {entry.step}: the run has deleted it in the meantime")
        return
    state = "good" if not row["faults"] else plural(len(row["faults"]), "fault")
    print(f"step {entry.step}: {state}, {_speed(row['bytes'], row['seconds'])}")
    for fault in row["faults"]:
        _tell_fault(fault)


def _tell_fault(fault: dict[str, Any]) -> None:
    where = f", bytes {fault['start']} to {fault['stop']}" if fault["stop"] > fault["start"] else ""
    print(f"  {fault['file']}{where}")
    print(f"    {fault['what']}{': ' if fault['name'] else ''}{fault['name']}")


def _speed(size: int, seconds: float) -> str:
    return f"{size_text(size)} in {seconds:.1f} s ({size / _GB / max(seconds, 1e-9):.2f} GB/s)"


def _some(names: list[str]) -> str:
    text = ", ".join(names)
    room = width()
    return text if room is None else shortened(text, 2 * room)
