"""The training that the kill tests kill.

Small, but with everything in it that a restart can get wrong: dropout and random augmentation, batch norm's buffers,
AdamW's moments, a schedule, clipping, epochs that no step ends with, and parameters of odd sizes that fill several of
DDP's buckets (the first of which holds 1 MiB).

It leaves its evidence in a folder of its own, written by itself, so that dtrain isn't asked whether dtrain is right:

    lives.jsonl         a line for each trainer that came up: rank, process id, its supervisor's
    trace-<rank>.jsonl  a line for each micro-batch that was computed: life, step, sample ids
    phases.jsonl        a line for each validation that rank 0 has begun or ended
    result-<rank>.json  digests of the weights and of the optimizer's state, when the training is done

    torchrun --standalone --nproc-per-node 2 -m tests.train_job '{"run": ..., "evidence": ..., "steps": 30}'
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SAMPLES = 101
"""A prime: no epoch ends with a step."""
MICRO_BATCH = 3
GLOBAL_BATCH = 8 * MICRO_BATCH
"""Eight micro-batches: 4 and 4 on two ranks, but 2, 3 and 3 on three."""
HELD_OUT = 53
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
    evaluate_every: int = 0
    """Steps from one validation to the next; 0 for none. The best three models are kept."""
    patience: int = 0
    """Validations without a better model, after which it stops; 0 for never."""
    guards: dict[str, Any] = field(default_factory=dict)
    nan_at: int = 0
    """The step in which one rank's gradient isn't finite; 0 for never."""
    pass_over: int = 0
    """A step that is left out; 0 for none."""
    flip_at: tuple[int, ...] = ()
    """Steps after which a bit of one rank's parameters flips, once each."""
    flip: int = 0
    """Chooses the bit."""
    rank: int = 0
    """The one that either happens to."""

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

        def __init__(self, count: int = SAMPLES) -> None:
            generator = torch.Generator().manual_seed(count)
            self._inputs = torch.randn(count, _FEATURES, generator=generator)

        def __len__(self) -> int:
            return len(self._inputs)

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = self._inputs[index]
            return {"id": index, "input": sample + 0.05 * torch.randn_like(sample), "label": index % _CLASSES}

    class Wobble(dtrain.Mean):
        """Looks like chance, and changes with every bit of the weights."""

        def compute(self) -> float:
            return 1e6 * super().compute() % 1

    def scored(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        losses = F.cross_entropy(model(batch["input"]), batch["label"], reduction="none")
        return losses.double().sum(), len(losses)

    def train(run: dtrain.Run) -> None:
        def tell(step: int, what: str) -> None:
            if run.is_first:
                append(evidence / "phases.jsonl", {"step": step, "what": what})

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
        average = dtrain.EMA(model, optimizer, decay=0.9)
        run.track(model=model, optimizer=optimizer, schedule=schedule, average=average)
        if options.pass_over:
            run._loop._skipped.add(options.pass_over)
        at = 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (torch.nan if at == options.nan_at and run.rank == options.rank else 1.0)

        if options.nan_at:
            next(iter(model.parameters())).register_hook(spoil)
        for step in run.steps(options.steps):
            at = step.number
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
            if step.number in options.flip_at and run.rank == options.rank and once(evidence / f"flip-{step.number}"):
                dice = random.Random(options.flip)
                flat = dice.choice(list(model.parameters())).detach().view(-1).view(torch.int32)
                flat[dice.randrange(len(flat))] ^= 1 << dice.randrange(31)
            if options.evaluate_every and step.number % options.evaluate_every == 0:
                tell(step.number, "begun")
                run.evaluate(model, Samples(HELD_OUT), {"wobble": Wobble()}, outputs=scored)
                tell(step.number, "ended")
        bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        result = {
            "parameters": digest(dict(bare.named_parameters())),
            "weights": digest(bare.state_dict()),
            "optimizer": digest(optimizer.state_dict()),
            "schedule": digest(schedule.state_dict()),
            "average": digest(average.state_dict()),
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
            keep_best=dtrain.Best("val/wobble", k=3) if options.evaluate_every else None,
            early_stop=dtrain.EarlyStop("val/wobble", patience=options.patience) if options.patience else None,
            guards=dtrain.Guards(**options.guards),
        ),
    )


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line with one write. A kill may still cut it off, and it mustn't take the next line with it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, b"\n" + json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def once(marker: Path) -> bool:
    """Whether the marker isn't there yet; it is from now on."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def raise_once(marker: Path) -> None:
    """:raises RuntimeError: if the marker isn't there yet."""
    if once(marker):
        raise RuntimeError("an error in the user's own code")


if __name__ == "__main__":
    main()
