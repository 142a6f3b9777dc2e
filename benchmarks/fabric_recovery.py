r"""The job of by_hand_recovery.py with Lightning Fabric, under torchrun: its strategy, its checkpoints.

Fabric has no restarts of its own: torchrun starts the processes again, and what names the newest checkpoint that is
whole is written by hand, as there.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
        benchmarks/fabric_recovery.py --dir runs/fabric
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from by_hand_recovery import Options, batches, prepared_text, replace
from lightning_fabric import Fabric

from dtrain.examples.corpus import Windows
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT


def save_job(fabric: Any, state: dict[str, Any], folder: Path) -> None:
    """Save into a fresh file, then make it the newest, then delete those before the one before."""
    fresh = folder / f"step-{state['step']:08d}.ckpt"
    fabric.save(fresh, state)
    if fabric.is_global_zero:
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        replace(folder / "latest", fresh.name.encode())
        for old in sorted(folder.glob("step-*.ckpt"))[:-2]:
            old.unlink()


def train(o: Options) -> None:
    fabric: Any = Fabric(accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy="ddp")
    fabric.launch()
    rank, world_size = fabric.global_rank, fabric.world_size
    accumulate = o.global_batch // (o.micro_batch * world_size)
    o.dir.mkdir(parents=True, exist_ok=True)
    dataset = Windows(prepared_text(o.dir / "text.bin"), o.context)

    torch.manual_seed(o.seed)
    bare = GPT(layers=o.layers, heads=o.heads, width=o.width, dropout=o.dropout)
    plain = torch.optim.AdamW(bare.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = warmup_cosine(plain, warmup=20, steps=o.steps)
    model, optimizer = fabric.setup(bare, plain)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "step": 0}
    latest = o.dir / "latest"
    if latest.exists():
        fabric.load(o.dir / latest.read_text(), state)
    torch.manual_seed(o.seed + 1 + rank + world_size * state["step"])  # other dropout on each rank
    source = batches(dataset, o, step=state["step"], accumulate=accumulate)

    host = socket.gethostname()
    with (o.dir / "steps.jsonl").open("a", buffering=1) as log:
        while state["step"] < o.steps:
            for micro_batch in range(accumulate):
                x, y = next(source)
                with fabric.no_backward_sync(model, enabled=micro_batch < accumulate - 1):
                    logits = model(x)
                    fabric.backward(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / accumulate)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            line = {"time": time.time(), "rank": rank, "host": host, "pid": os.getpid(), "step": state["step"]}
            log.write(json.dumps(line) + "\n")
            if state["step"] % o.save_every == 0 or state["step"] == o.steps:
                save_job(fabric, state, o.dir)


if __name__ == "__main__":
    train(tyro.cli(Options))
