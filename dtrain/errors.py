"""Every error that dtrain raises on purpose.

A message names the value, the place and the remedy. `DtrainError`s are the same on every try, so a run stops at the
first one; whatever else a trainer raises is taken for an accident, and the trainer is started again.
"""


class DtrainError(Exception):
    """The base of all of them: trying again would end in the same way."""


class ConfigError(DtrainError):
    """An option, or the way the program was started, can't be right."""


class DataError(DtrainError):
    """The data set is empty, too small, or not the one that the checkpoint was made with."""


class UsageError(DtrainError):
    """The training loop calls something in a way that would give wrong results."""


class StateError(DtrainError):
    """What is tracked can't be saved, or doesn't fit what was saved."""


class NoGoodCheckpoint(DtrainError):
    """The run has commits, and none of them can be read: starting at step 0 would hide the loss."""


class Fenced(DtrainError):
    """A newer generation has taken the run over: this one is a leftover and may not write any more."""


class Garbage(DtrainError):
    """The training has come to numbers that aren't worth to go on with, and `Config.guards` says to stop."""


class Unreliable(DtrainError):
    """A machine computes other numbers than the others, or than it did before: it can't be trusted."""


class Damaged(Exception):
    """A checkpoint doesn't hold the bytes that were saved. The run goes back to the commit before it."""


class SaveError(Exception):
    """A checkpoint could not be written, on any of the ranks. The commit before it stands."""
