r"""A job that survives its workers, written by hand on torchrun and torch's distributed checkpoints (DCP).

It is what the recovery of dtrain is measured against, written the way it is usually done well: a loop on
DDP, saved by DCP every few steps into a folder of its own; a file that names the newest folder
that is whole, replaced by a rename; on start, DCP loads from there and the sampler goes on at that step. The
text lies in one prepared file that is mapped into memory, so that a restart doesn't read it anew. What it
leaves out is the random state: after a restart the dropout is another.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        benchmarks/by_hand_recovery.py --dir runs/by_hand

The variable is needed: without it all attempts share one store, and a new one finds the addresses of the
dead. It then burns restarts, or hangs.

For every step that a rank has finished, one line of JSON goes to <dir>/steps.jsonl: time, rank, host,
pid, step. The time of a recovery is that from a kill to the first line whose step is higher than any before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from dtrain.examples.corpus import Windows, collate, read_corpus
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train with checkpoints and restarts that are written by hand."""

    dir: Path = Path("runs/by_hand")
    """Folder of the job: its checkpoints, its text and its list of steps."""

    steps: int = 300
    """Steps to train for."""

    save_every: int = 10
    """Steps from one checkpoint to the next."""

    global_batch: int = 16
    """Windows of text in a step, over all processes together."""

    micro_batch: int = 4
    """Windows of text in one forward and backward pass."""

    seed: int = 0
    """Fixes the first weights and the order of the windows."""

    lr: float = 3e-3
    """Learning rate at its highest."""

    layers: int = 4
    """Blocks of attention and MLP, one upon the other."""

    heads: int = 4
    """Attention heads in a block."""

    width: int = 128
    """Features that a position carries through the model."""

    context: int = 128
    """Bytes that the model sees at once."""

    dropout: float = 0.1
    """Share of the features that a pass drops at random."""


class ResumableSampler(DistributedSampler[int]):
    """A DistributedSampler that can begin in the middle of an epoch.

    :ivar start: samples of this rank that the next pass leaves out.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter(indices[self.start :])


class Job(Stateful):
    """All that a checkpoint holds, in the form that DCP asks for."""

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.schedule.load_state_dict(state_dict["schedule"])
        self.step = state_dict["step"]


def replace(path: Path, content: bytes) -> None:
    """Write a file so that others see the old content or the new, also after a crash."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save_job(job: Job, folder: Path) -> None:
    """Save into a fresh folder, then make it the newest, then delete those before the one before."""
    fresh = folder / f"step-{job.step:08d}"
    if dist.get_rank() == 0 and fresh.exists():
        shutil.rmtree(fresh)  # what an attempt that died in its save has left
    dist.barrier()
    save({"job": job}, checkpoint_id=fresh)
    if dist.get_rank() == 0:
        replace(folder / "latest", fresh.name.encode())
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)


def load_job(job: Job, folder: Path) -> None:
    """Load the newest checkpoint, if there is one."""
    latest = folder / "latest"
    if latest.exists():
        load({"job": job}, checkpoint_id=folder / latest.read_text())


def prepared_text(path: Path) -> npt.NDArray[np.uint8]:
    """The text as one file, mapped into memory; rank 0 makes it in the first attempt."""
    if dist.get_rank() == 0 and not path.exists():
        replace(path, read_corpus().tobytes())
    dist.barrier()
    return np.memmap(path, dtype=np.uint8, mode="r")


def batches(dataset: Windows, o: Options, *, step: int, accumulate: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches from the one after `step` on, epoch after epoch."""
    sampler = ResumableSampler(dataset, shuffle=True, seed=o.seed, drop_last=True)
    loader = DataLoader(
        dataset, batch_size=o.micro_batch, sampler=sampler, num_workers=0, collate_fn=collate, drop_last=True
    )
    epoch, done = divmod(step * accumulate, sampler.num_samples // o.micro_batch)
    while True:
        sampler.set_epoch(epoch)
        sampler.start = done * o.micro_batch
        yield from loader
        epoch, done = epoch + 1, 0


def train(o: Options) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulate, left_over = divmod(o.global_batch, o.micro_batch * world_size)
    if left_over or not accumulate:
        sys.exit(
            f"--global-batch {o.global_batch}: must be a multiple of --micro-batch {o.micro_batch} times the "
            f"{world_size} processes; change one of the three"
        )
    o.dir.mkdir(parents=True, exist_ok=True)
    dataset = Windows(prepared_text(o.dir / "text.bin"), o.context)

    torch.manual_seed(o.seed)
    bare = GPT(layers=o.layers, heads=o.heads, width=o.width, dropout=o.dropout)
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1)
    job = Job(model, optimizer, warmup_cosine(optimizer, warmup=20, steps=o.steps))
    load_job(job, o.dir)
    torch.manual_seed(o.seed + 1 + rank + world_size * job.step)  # other dropout on each rank
    source = batches(dataset, o, step=job.step, accumulate=accumulate)

    host = socket.gethostname()
    with (o.dir / "steps.jsonl").open("a", buffering=1) as log:
        while job.step < o.steps:
            mean = 0.0
            for micro_batch in range(accumulate):
                x, y = next(source)
                last = micro_batch == accumulate - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    logits = model(x)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / accumulate
                    loss.backward()
                mean += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            job.schedule.step()
            optimizer.zero_grad(set_to_none=True)
            job.step += 1
            line = {"time": time.time(), "rank": rank, "host": host, "pid": os.getpid(), "step": job.step}
            log.write(json.dumps(line) + "\n")
            if rank == 0 and job.step % 10 == 0:
                print(f"step {job.step} loss {mean:.4f}", flush=True)
            if job.step % o.save_every == 0 or job.step == o.steps:
                save_job(job, o.dir)
    dist.destroy_process_group()


if __name__ == "__main__":
    train(tyro.cli(Options))
