"""`Failure`: why a trainer failed, told by itself to its supervisor through a pipe, while its peers still see it alive.

Its connections must not break before that: a peer that sees one break fails as well, and would be taken for the first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass

import torch.distributed as dist

from dtrain.errors import DtrainError, SaveError

_TRACE_BYTES = 30_000
"""Less than the capacity of a pipe, so that a trainer is never held up while it says why it failed."""
_CAUSE_LETTERS = 1000
_KILLED_BEFORE_S = 5.0


class GoBack(Exception):
    """Raised by all trainers at once, with the same reason: what is in memory is given up for what was saved.

    :param over: the step to pass over then; 0 for none.
    """

    def __init__(self, reason: str, *, over: int = 0) -> None:
        super().__init__(reason)
        self.over = over


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Of one trainer."""

    cause: str
    """One line."""
    trace: str = ""
    final: bool = False
    """The next try would end in the same way."""
    unsaved: bool = False
    """A checkpoint couldn't be written."""
    victim: bool = False
    """It looks like the outcome of another rank's death."""
    agreed: bool = False
    """No rank has failed: the trainers have agreed to go back,
    """
    over: int = 0
    """and to pass over this step; 0 for none."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of the exception that is being handled."""
        if isinstance(error, SystemExit):
            return cls(cause=f"exited with {error.code!r}", trace=traceback.format_exc()[-_TRACE_BYTES:])
        if isinstance(error, GoBack):
            return cls(cause=str(error)[:_CAUSE_LETTERS], agreed=True, over=error.over)
        trace = str(error) if isinstance(error, DtrainError | SaveError) else traceback.format_exc()
        return cls(
            cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:_CAUSE_LETTERS],
            trace=trace[-_TRACE_BYTES:],
            final=isinstance(error, DtrainError),
            unsaved=isinstance(error, SaveError),
            victim=_is_victim(error),
        )

    @classmethod
    def of_code(cls, code: int) -> Failure:
        """Of a trainer that ended without a word. :param code: as `Child.wait` gives it."""
        return cls(cause=described(code))

    def tell(self, pipe: int) -> None:
        """Say it to the supervisor, and wait to be killed."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(pipe, json.dumps(asdict(self)).encode() + b"\n")
        os.close(pipe)
        time.sleep(_KILLED_BEFORE_S)

    @classmethod
    def heard(cls, pipe: int) -> Failure | None:
        """What a trainer said; None if it ended without a word."""
        # Not up to the end of the pipe: a data loader's worker may hold that open.
        data = b""
        while not data.endswith(b"\n") and (part := os.read(pipe, 1 << 16)):
            data += part
        return cls(**json.loads(data)) if data.endswith(b"\n") else None


def described(code: int) -> str:
    """How a process ended, by its exit code."""
    return f"exited with code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _is_victim(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/transport", "Connection closed by peer", "Connection reset", "NCCL")
    )
