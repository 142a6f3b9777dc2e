"""Imports what every trainer would import, once and before anything else of dtrain: trainers are forks.

torch._dynamo is what the first optimizer imports, which takes a second. A third of that would be the garbage
collector's, which looks again and again at a million objects that stay for good. So it waits, and passes over them
ever after.
"""

import gc
import os

STARTED = os.getpid(), os.getppid()
"""This process and its parent, before the import has taken its time: the parent may be dead by its end."""

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
