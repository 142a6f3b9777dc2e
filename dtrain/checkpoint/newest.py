"""Which checkpoint of a run is read by somebody else, who may do so while the run goes on and deletes some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import MANIFEST, Manifest
from dtrain.checkpoint.log import Entry, Log
from dtrain.checkpoint.reader import read_manifest
from dtrain.errors import ConfigError, Damaged, NoGoodCheckpoint
from dtrain.storage.base import Storage


def newest_good(storage: Storage, log: Log, step: int | None = None) -> tuple[Entry, Manifest, list[str]]:
    """The newest commit whose manifest and sizes are right, with what there is to say of newer ones. One that was found
    bad before is taken where there is no other: what couldn't be read may be back, and every byte is checked.

    :param step: only those of this step.
    :raises ConfigError: there is none of this step.
    :raises NoGoodCheckpoint: there is none at all.
    :raises Damaged: there are some, and none of them is good.
    """
    log.refresh()
    damaged: dict[str, tuple[int, str]] = {}
    while commits := [
        commit
        for commit in (*log.found_bad(), *log.commits())
        if step in (None, commit.step) and commit.attempt not in damaged
    ]:
        commit = commits[-1]
        try:
            _, manifest = read_manifest(storage, f"{CHECKPOINTS}/{commit.attempt}", MANIFEST, commit.manifest)
        except Damaged as error:
            log.refresh()
            if not any(entry.kind == "retire" and entry.attempt == commit.attempt for entry in log.entries):
                damaged[commit.attempt] = commit.step, str(error)
        else:
            told = [f"checkpoint of step {at} is damaged and passed over: {why}" for at, why in damaged.values()]
            return commit, manifest, told
    if damaged:
        raise Damaged("; ".join(f"step {at}: {why}" for at, why in damaged.values()))
    if step is not None:
        known = ", ".join(str(commit.step) for commit in log.commits() or log.found_bad()) or "none"
        deleted = any(entry.kind == "retire" and entry.step == step for entry in log.entries)
        what = f"has deleted its checkpoint of step {step}" if deleted else f"has no good checkpoint of step {step}"
        raise ConfigError(f"{storage.root} {what}; there are: {known}")
    raise NoGoodCheckpoint(f"{storage.root} has no good checkpoint")


@contextlib.contextmanager
def still_there(storage: Storage, folder: str) -> Iterator[None]:
    """Tells a checkpoint that its run has deleted while it was read from one that is damaged.

    :param folder: the checkpoint's, in the storage.
    :raises ConfigError: it is deleted.
    """
    try:
        yield
    except Damaged as error:
        if not folder.startswith(f"{CHECKPOINTS}/"):  # in no run
            raise
        log = Log(storage)
        log.refresh()
        for entry in log.entries:
            if entry.kind == "retire" and folder == f"{CHECKPOINTS}/{entry.attempt}":
                raise ConfigError(
                    f"{storage.root}: the run has deleted step {entry.step} while it was read; ask for a newer one"
                ) from error
        raise
