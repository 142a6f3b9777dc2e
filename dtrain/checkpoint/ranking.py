"""The checkpoints of a run by what they were measured to be worth, as the log and the checkpoints themselves tell."""

from __future__ import annotations

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.policy import best_of
from dtrain.checkpoint.reader import read_manifest
from dtrain.checkpoint.state import position_of
from dtrain.criteria import Best
from dtrain.errors import ConfigError, Damaged
from dtrain.storage.base import Storage


def criterion_of(storage: Storage, log: Log) -> Best | None:
    """What a run goes by (`Config.keep_best`), as its newest checkpoint remembers it."""
    for entry in reversed([*log.found_bad(), *log.commits()]):
        try:
            _, manifest = read_manifest(storage, f"{CHECKPOINTS}/{entry.attempt}", MANIFEST, entry.manifest)
        except Damaged:
            continue
        by = position_of(manifest).get("selection", {}).get("by")
        return Best(**by) if by else None
    return None


def best_step(storage: Storage) -> int:
    """Of a run's best checkpoint.

    :raises ConfigError: the run doesn't go by a metric, or no checkpoint has it.
    """
    log = Log(storage)
    log.refresh()
    criterion = criterion_of(storage, log)
    if criterion is None:
        raise ConfigError(f"{storage.root}: the run doesn't go by a metric (Config.keep_best); give a step")
    found = best_of(log.commits() or log.found_bad(), criterion)
    if not found:
        raise ConfigError(f"{storage.root}: no checkpoint has {criterion.metric}; give a step")
    return found[0].step
