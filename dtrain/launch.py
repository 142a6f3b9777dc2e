"""`launch`: runs a training function on every rank, and again when one dies.

torchrun --nproc-per-node 4 train.py      on a cluster, a machine, a laptop
python train.py                           one process, supervised in the same way
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from dtrain.checkpoint.channel import Direct
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slots import Slots
from dtrain.config import Config
from dtrain.elastic.farewell import end_with
from dtrain.elastic.generation import Group
from dtrain.elastic.page import Page, Phase
from dtrain.elastic.placement import Placement
from dtrain.elastic.supervisor import Life, Supervisor
from dtrain.errors import ConfigError, UsageError
from dtrain.training.run import Run

_show = sys.excepthook


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _show(kind, error, trace)
    end_with(error)


sys.excepthook = _uncaught

# Asked in the usual way, whether there is a GPU, CUDA is started and can't be used after a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def launch(main: Callable[[Run], None], config: Config, *, in_place: bool = False) -> None:
    """Train. Returns when `main` has come to its end on all ranks.

    `main` runs in a process that is forked from this one. What is read or built before `launch` is there in every
    trainer at no cost, also after a restart; threads and CUDA must not be started before.

    :param main: builds model, optimizer and data, and has the loop.
    :param config: the run's options.
    :param in_place: run `main` in this very process, for a debugger; nothing is started again when it fails.
    :raises ConfigError: the process can't be forked, or wasn't started by torchrun.
    :raises UsageError: it is given something else than a function and a `Config`.
    :raises SystemExit: the training failed for good (1), or was ended after a checkpoint, by Ctrl-C (130) or by a
        signal or a notice (143); see docs/faults.md.
    """
    if not callable(main) or not isinstance(config, Config):
        given = f"{type(main).__qualname__}, {type(config).__qualname__}"
        raise UsageError(f"launch({given}): give the training function, and a dtrain.Config")
    placement = Placement.from_env()

    def train(life: Life) -> None:
        config.check_world(placement.world_size)  # before ranks that go on to connect find others gone
        device = _device(placement.local_rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=life.group.trainers_store(life.generation),
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timedelta(seconds=config.timeout_s),
        )
        run = Run(config, device, life)
        main(run)
        run.close()
        life.page.mark(Phase.END)
        dist.destroy_process_group()

    if not in_place and config.dir.startswith("memory://"):
        raise ConfigError(
            f"dir={config.dir!r} is the memory of one process, and a run is of several: keep it elsewhere, or use "
            "launch(..., in_place=True)"
        )
    if in_place:
        group, slots = Group(placement, config.timeout_s), Slots()
        saver = Saver.of(config, group.savers_store, placement.rank, placement.world_size, slots)
        train(Life(group, 0, Page.shared(), slots, Direct(saver, slots.board)))
    else:
        Supervisor(config, placement, train).run()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.cuda.init()
    return device
