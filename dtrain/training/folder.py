"""The run folder at the start of a run: made, or found to be this run's. So for the local folder beside a bucket."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dtrain.checkpoint.catalog import CONFIG
from dtrain.checkpoint.manager import from_rank_0, on_all_ranks
from dtrain.config import SAME_BITS, Config
from dtrain.errors import ConfigError
from dtrain.observe.events import say
from dtrain.storage.base import Storage

_NEW: dict[str, Any] = {"precision": "fp32", "reduction": "fast", "tf32": False}
"""What runs were that began before there was a choice."""
_RUN = "run"
"""Among the options: what tells this run from any other."""


def open_folders(config: Config, storages: Sequence[Storage]) -> None:
    """All ranks must reach this.

    :param storages: the run folder, and the local one if checkpoints are made there too.
    :raises ConfigError: one of them can't be written to or belongs to another run, or a rank doesn't reach it.
    """
    run, usable = from_rank_0(partial(_open, config, storages))
    try:
        os.makedirs(config.local_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"local_dir={config.local_dir!r} can't be made ({error.strerror}), which is for events and metrics; choose "
            "another folder"
        ) from error
    for number, storage in enumerate(storages[:usable]):
        # That nobody answers may pass: another try is worth it.
        problem = on_all_ranks(partial(_see, storage, run), (ValueError,))
        if problem and number == 0:
            raise ConfigError(
                f"dir={config.dir!r}: {problem}. All ranks must reach the same folder: put it on a disk that all nodes "
                "share, or into a bucket"
            )
        if problem:
            raise ConfigError(
                f"local_save_every={config.local_save_every!r}: {problem}. All ranks must reach local_dir="
                f"{config.local_dir!r}; put it on a shared disk, or leave local_save_every out"
            )


def _open(config: Config, storages: Sequence[Storage]) -> tuple[str, int]:
    """On rank 0. :returns: what tells this run from any other, and how many of its folders can be used."""
    options = {name: getattr(config, name) for name in SAME_BITS}
    new = uuid.uuid4().hex
    found = _kept(storages[0], options | {_RUN: new})
    before = _NEW | found
    differ = [
        f"{name} was {before[name]!r}, is now {value!r}" for name, value in options.items() if before[name] != value
    ]
    if differ:
        raise ConfigError(
            f"{config.dir} belongs to a run with other options: {'; '.join(differ)}. Put them back, or choose another "
            "folder"
        )
    run = str(found.get(_RUN, ""))
    for storage in storages[1:]:
        if not run:
            raise ConfigError(
                f"{config.dir} is of a time when runs had no identifier, so a local folder can't be known to be its "
                "own; leave local_save_every out"
            )
        try:
            known = _kept(storage, options | {_RUN: run}).get(_RUN)
        except (ConfigError, OSError) as error:
            if run == new:
                raise
            say(f"local_dir={config.local_dir!r}: {error}. Until that is mended, the run does without")
            return run, 1
        if known != run:
            raise ConfigError(
                f"local_dir={config.local_dir!r} holds the checkpoints of another run than {config.dir}; choose "
                "another folder, or delete it"
            )
    return run, len(storages)


def _kept(storage: Storage, options: dict[str, Any]) -> dict[str, Any]:
    """What a folder remembers: these options, if it is new."""
    storage.prepare()
    try:
        data = storage.read(CONFIG)  # first, as the disk may have become full since
    except FileNotFoundError:
        with suppress(FileExistsError):
            storage.create(CONFIG, json.dumps(options, indent=1).encode())
            return options
        data = storage.read(CONFIG)
    try:
        found: dict[str, Any] = json.loads(data)
        if not isinstance(found, dict) or not options.keys() - {_RUN} <= found.keys() | _NEW.keys():
            raise ValueError("it doesn't hold the options of a run")
    except ValueError as error:
        raise ConfigError(f"{storage.root}/{CONFIG} can't be read ({error}); bring it back or delete it") from error
    return found


def _see(storage: Storage, run: str) -> None:
    """:raises ValueError: this rank doesn't."""
    try:
        seen = json.loads(storage.read(CONFIG)).get(_RUN, "") == run
    except FileNotFoundError:
        seen = False
    if not seen:
        raise ValueError(f"{storage.root} on {socket.gethostname()} is not the folder that rank 0 sees")
