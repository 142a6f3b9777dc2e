"""The training that the kill tests kill.

Small, but with everything in it that a restart can get wrong: dropout and random augmentation, batch norm's buffers,
AdamW's moments, a schedule, clipping, epochs that no step ends with, and parameters of odd sizes that fill several of
DDP's buckets (the first of which holds 1 MiB).

It leaves its evidence in a folder of its own, written by itself, so that dtrain isn't asked whether dtrain is right:

    lives.jsonl         a line for each trainer that came up: rank, process id, its supervisor's
    trace-<rank>.jsonl  a line for each micro-batch that was computed: life, step, sample ids
    result-<rank>.json  digests of the weights and of the optimizer's state, when the training is done

    torchrun --standalone --nproc-per-node 2 -m tests.train_job '{"run": ..., "evidence": ..., "steps": 30}'
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SAMPLES = 101
"""A prime: no epoch ends with a step."""
MICRO_BATCH = 3
GLOBAL_BATCH = 8 * MICRO_BATCH
"""Eight micro-batches: 4 and 4 on two ranks, but 2, 3 and 3 on three."""
_FEATURES, _CLASSES = 33, 7


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a test can choose."""

    run: str
    """The run folder, or its URL."""
    evidence: str
    """The folder for what the job writes about itself."""
    steps: int
    save_every: int = 5
    snapshot_every: int | str = "auto"
    replicate_snapshots: int = 0
    step_s: float = 0.02
    """Sleep in each step, so that there is time to kill something in it."""
    raise_at: int = 0
    """The step in which one rank raises an error, the first time that it gets there; 0 for never."""
    raise_rank: int = 0
    local: str = ""
    """What can't be on a bucket."""
    local_save_every: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    reduction: Literal["fast", "exact"] = "fast"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Import torch only here: the tests import this module for its numbers."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.tensor import DTensor
    from torch.nn import functional as F

    import dtrain

    options = Options(**json.loads(sys.argv[1]))
    evidence = Path(options.evidence)
    evidence.mkdir(parents=True, exist_ok=True)

    class Samples:
        """Known by their ids; each looks a little different whenever it is drawn."""

        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(1)
            self._inputs = torch.randn(SAMPLES, _FEATURES, generator=generator)

        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = self._inputs[index]
            return {"id": index, "input": sample + 0.05 * torch.randn_like(sample), "label": index % _CLASSES}

    def train(run: dtrain.Run) -> None:
        append(evidence / "lives.jsonl", {"rank": run.rank, "pid": os.getpid(), "supervisor": os.getppid()})
        life = torch.tensor([time.time_ns()])
        dist.broadcast(life, src=0)
        model = run.parallelize(
            nn.Sequential(
                nn.Linear(_FEATURES, 517),
                nn.BatchNorm1d(517),
                nn.GELU(),
                nn.Dropout(0.2),
                nn.Linear(517, 1031),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(1031, 601),
                nn.GELU(),
                nn.Linear(601, _CLASSES),
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        data = run.data(Samples())
        run.track(model=model, optimizer=optimizer, schedule=schedule)
        for step in run.steps(options.steps):
            for batch in step.micro_batches(data):
                ids = batch["id"].tolist()
                place = {"life": int(life), "pid": os.getpid(), "world_size": run.world_size}
                append(evidence / f"trace-{run.rank}.jsonl", place | {"step": step.number, "ids": ids})
                if options.raise_at == step.number and options.raise_rank == run.rank:
                    raise_once(evidence / "raised")
                loss = F.cross_entropy(model(batch["input"]), batch["label"], reduction="sum")
                step.backward(loss, count=len(ids))
            step.update(optimizer, schedule, clip=0.5)
            time.sleep(options.step_s)
        bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        result = {
            "parameters": digest(dict(bare.named_parameters())),
            "weights": digest(bare.state_dict()),
            "optimizer": digest(optimizer.state_dict()),
            "schedule": digest(schedule.state_dict()),
        }
        (evidence / f"result-{run.rank}.json").write_text(json.dumps(result))

    def digest(value: Any) -> str:
        """SHA-256 of a state: of every tensor's bytes, and of every number's exact text. All ranks must reach it."""
        found = hashlib.sha256()

        def add(path: str, part: Any) -> None:
            if isinstance(part, dict):
                for key in sorted(part, key=str):
                    add(f"{path}.{key}", part[key])
            elif isinstance(part, list | tuple):
                for index, item in enumerate(part):
                    add(f"{path}.{index}", item)
            elif isinstance(part, torch.Tensor):
                part = part.full_tensor() if isinstance(part, DTensor) else part
                found.update(f"{path} {part.dtype} {tuple(part.shape)}\n".encode())
                found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{path} {part!r}\n".encode())

        add("", value)
        return found.hexdigest()

    dtrain.launch(
        train,
        dtrain.Config(
            dir=options.run,
            global_batch=GLOBAL_BATCH,
            micro_batch=MICRO_BATCH,
            seed=7,
            save_every=options.save_every,
            snapshot_every=options.snapshot_every,
            replicate_snapshots=options.replicate_snapshots,
            timeout_s=60,
            max_failures_per_hour=10_000,
            max_stalled=20,  # kills by chance come several before a new step
            local_dir=options.local,
            local_save_every=options.local_save_every,
            parallel=options.parallel,
            reduction=options.reduction,
        ),
    )


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line with one write. A kill may still cut it off, and it mustn't take the next line with it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, b"\n" + json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def raise_once(marker: Path) -> None:
    """:raises RuntimeError: if the marker isn't there yet."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    raise RuntimeError("an error in the user's own code")


if __name__ == "__main__":
    main()
