r"""The job of by_hand_recovery.py with torchft: replicas that go on without each other.

Each replica is one process under a torchrun of its own, which starts it again; torchft's lighthouse tells them who is
there. One that comes back gets its state from one that trains. When one is lost, the others go on without it, with so
many samples less in a step. Against the loss of all of them the first writes a checkpoint every few steps. The
gradients are averaged in one go behind the backward pass: with torchft's own DistributedDataParallel (0.2.0) and gloo,
the death of a replica ends the others by an AssertionError.

    torchft_lighthouse --bind [::]:29510 --min_replicas 1
    REPLICA=0 TORCHFT_LIGHTHOUSE=http://localhost:29510 torchrun --standalone --max-restarts 3 \
        benchmarks/torchft_recovery.py --dir runs/torchft
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from by_hand_recovery import Options, replace
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchft import Manager, Optimizer, ProcessGroupGloo

from dtrain.examples.corpus import Windows, collate, read_corpus
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT

REPLICAS = 2


def batches(
    dataset: Windows, o: Options, *, replica: int, step: int, accumulate: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A replica's micro-batches from the one after `step` on, epoch after epoch."""
    sampler: DistributedSampler[Tensor] = DistributedSampler(
        dataset, num_replicas=REPLICAS, rank=replica, shuffle=True, seed=o.seed, drop_last=True
    )
    epoch, done = divmod(step * accumulate, sampler.num_samples // o.micro_batch)
    while True:
        sampler.set_epoch(epoch)
        order: list[Any] = list(sampler)
        for begin in range(done * o.micro_batch, len(order) - o.micro_batch + 1, o.micro_batch):
            yield collate(dataset.__getitems__(order[begin : begin + o.micro_batch]))
        epoch, done = epoch + 1, 0


def average(manager: Any, model: torch.nn.Module) -> None:
    """The gradients, over all replicas that take part."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    manager.allreduce(flat).wait()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(o: Options) -> None:
    replica = int(os.environ["REPLICA"])
    accumulate = o.global_batch // (o.micro_batch * REPLICAS)
    o.dir.mkdir(parents=True, exist_ok=True)
    text = o.dir / f"text{replica}.bin"
    if not text.exists():
        replace(text, read_corpus().tobytes())
    dataset = Windows(np.memmap(text, dtype=np.uint8, mode="r"), o.context)

    torch.manual_seed(o.seed)
    bare = GPT(layers=o.layers, heads=o.heads, width=o.width, dropout=o.dropout)
    plain = torch.optim.AdamW(bare.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = warmup_cosine(plain, warmup=20, steps=o.steps)

    def state() -> dict[str, Any]:
        return {"model": bare.state_dict(), "optimizer": plain.state_dict(), "schedule": schedule.state_dict()}

    def load(found: dict[str, Any]) -> None:
        bare.load_state_dict(found["model"])
        plain.load_state_dict(found["optimizer"])
        schedule.load_state_dict(found["schedule"])

    manager: Any = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=state,
        replica_id=f"replica{replica}",
        timeout=timedelta(seconds=30),
        init_sync=False,  # all begin with the same seed, or the same checkpoint
    )
    latest = o.dir / "latest.pt"
    if latest.exists():
        found = torch.load(latest)
        load(found)
        manager.load_state_dict(found["manager"])
    optimizer: Any = Optimizer(manager, plain)
    torch.manual_seed(o.seed + 1 + replica + REPLICAS * manager.current_step())  # other dropout in each replica

    step = -1
    with (o.dir / "steps.jsonl").open("a", buffering=1) as log:
        while manager.current_step() < o.steps:
            if manager.current_step() != step:  # it has got the state of another, or has to do the step again
                step = manager.current_step()
                source = batches(dataset, o, replica=replica, step=step, accumulate=accumulate)
            optimizer.zero_grad()
            for _ in range(accumulate):
                x, y = next(source)
                logits = bare(x)
                (F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / accumulate).backward()
            average(manager, bare)
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            optimizer.step()
            if manager.current_step() == step:
                step = -1
                continue
            schedule.step()
            step += 1
            line = {
                "time": time.time(),
                "rank": replica,
                "host": "",
                "pid": os.getpid(),
                "step": manager.current_step(),
            }
            line["of"] = manager.num_participants()
            log.write(json.dumps(line) + "\n")
            if manager.current_step() % o.save_every == 0 and manager.participating_rank() == 0:
                file = io.BytesIO()
                torch.save(state() | {"manager": manager.state_dict()}, file)
                replace(latest, file.getvalue())
    manager.shutdown()


if __name__ == "__main__":
    train(tyro.cli(Options))
