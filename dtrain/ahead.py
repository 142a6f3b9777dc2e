"""Imports what every trainer would import, once and before anything else of dtrain: trainers are forks.

torch._dynamo is what the first optimizer imports, which takes a second. A third of that would be the garbage
collector's, which looks again and again at a million objects that stay for good. So it waits, and passes over them
ever after.
"""

import gc
import os

STARTED = os.getpid(), os.getppid()
"""This process and its parent, before the import has taken its time: the parent may be dead by its end."""

_WORKER = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # torchrun gives one to each process that it starts
_before, _, _ = os.environ.get("DTRAIN_FIRST", "none:").rpartition(":")
if "RANK" in os.environ and _before != _WORKER:
    os.environ["DTRAIN_FIRST"] = f"{_WORKER}:{STARTED[0]}"
FIRST = os.environ.get("DTRAIN_FIRST") == f"{_WORKER}:{STARTED[0]}"
"""Whether this is the process that torchrun has started for a rank, and not a program that such a one has started and
that has its environment from it."""

_was_on = gc.isenabled()
gc.disable()
try:
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401
finally:
    gc.freeze()
    if _was_on:
        gc.enable()
