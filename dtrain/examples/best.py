"""Which of a run's checkpoints is the best, for what comes behind the loop."""

from __future__ import annotations

import dtrain
from dtrain.checkpoint.log import Log
from dtrain.checkpoint.policy import best_of
from dtrain.errors import ConfigError


def best_model(run: dtrain.Run) -> tuple[int, float]:
    """Step and metric of the best checkpoint, by the run's own `keep_best`; after the loop, when all is committed.

    :raises ConfigError: the run doesn't go by a metric, or has none that was measured.
    """
    criterion = run.config.keep_best
    log = Log(run.config.storage())
    log.refresh()
    found = best_of(log.commits(), criterion) if criterion else []
    if criterion is None or not found:
        raise ConfigError(f"{run.config.dir}: no checkpoint has a metric to go by ({criterion})")
    return found[0].step, found[0].metrics[criterion.metric]
