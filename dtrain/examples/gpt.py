"""A byte-level GPT, trained with dtrain.

The model reads bytes and predicts the next one: 256 words, no tokenizer. By default it has about a million parameters,
is small enough for two CPU cores, and all that matters is in it: dropout, gradient accumulation, clipping, a schedule.
Without --data it learns the source of Python's standard library, which every machine has. The loss falls from 5.5 to
about 2.1 nats a byte in 300 steps.

One process:

    python -m dtrain.examples.gpt --dir runs/gpt

Two processes on one machine:

    torchrun --standalone --nproc-per-node 2 -m dtrain.examples.gpt --dir runs/gpt

Kill any of them while it runs, or start the same command again later: it goes on from the newest checkpoint,
and ends with the weights that it would have had undisturbed. To train on something else:

    python -m dtrain.examples.gpt --dir runs/notes --data notes/ letters.txt --steps 2000

To see how well it reads text that it doesn't learn, which the end of the text is then left out for:

    python -m dtrain.examples.gpt --dir runs/held-out --evaluate-every 50

A larger one on the GPUs of a machine:

    torchrun --standalone --nproc-per-node gpu -m dtrain.examples.gpt --model 1b --parallel fsdp --precision bf16 \
        --compile --activation-checkpointing selective --global-batch 64 --micro-batch 4

The text is read by corpus.py, the model is in transformer.py; this file has options, schedule, training, start.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import dtrain
from dtrain.errors import ConfigError
from dtrain.examples.corpus import Windows, collate, read_corpus
from dtrain.examples.transformer import GPT, SIZES, Size, operations_per_token, peak_of

# --- Options: each is a flag of the same name, with dashes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a byte-level GPT that survives what happens to its processes."""

    dir: str = "runs/gpt"
    """Folder of the run, or a URL (s3://...): its checkpoints are written here, and found here by the next start."""

    local_dir: str = ""
    """Folder for events and metrics, where the run's is a URL."""

    data: tuple[Path, ...] = ()
    """Files and folders to learn from. Without any: the Python standard library's own source."""

    model: Literal["1m", "10m", "30m", "125m", "350m", "1b"] = "1m"
    """Size of the model, in parameters."""

    layers: int | None = None
    """Blocks of attention and MLP, one upon the other. This and the next three come with --model, unless given."""

    heads: int | None = None
    """Attention heads in a block. The width must be a multiple of twice as many."""

    width: int | None = None
    """Features that a position carries through the model."""

    context: int | None = None
    """Bytes that the model sees at once."""

    dropout: float = 0.1
    """Share of the features that a pass drops at random."""

    steps: int = 300
    """Steps to train for. The learning rate has come down at the last of them."""

    global_batch: int = 16
    """Windows of text in a step, over all processes together."""

    micro_batch: int = 4
    """Windows of text in one forward and backward pass. A smaller one needs less memory."""

    seed: int = 0
    """Fixes the first weights, the order of the windows and the dropout."""

    lr: float = 3e-3
    """Learning rate at its highest."""

    warmup: int = 20
    """Steps in which the learning rate rises to its highest."""

    weight_decay: float = 0.1
    """Weight decay of AdamW."""

    clip: float = 1.0
    """Longest gradient that is let through, as a norm over all parameters."""

    parallel: Literal["none", "ddp", "fsdp", "hsdp"] = "ddp"
    """How the model is spread over the processes: copies, parts (FSDP2), or copies in parts (HSDP)."""

    shard_size: int | None = None
    """For hsdp: how many processes share a copy. By default those of a machine."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the passes."""

    tf32: bool = False
    """Let GPUs multiply fp32 numbers with 10 bits of mantissa."""

    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are added up: exact gives the same bits on any number of processes."""

    activation_checkpointing: Literal["none", "full", "selective"] | int = "none"
    """Blocks that compute their activations again in the backward pass: all, what is cheap in all, or every k-th."""

    compile: bool = False
    """Compile the blocks."""

    cpu_offload: bool = False
    """For fsdp and hsdp on GPUs: keep parameters and the optimizer's state in the memory of the host."""

    workers: int = 0
    """Processes that read windows ahead, for each process that trains."""

    evaluate_every: int | None = None
    """Measure loss and perplexity after every so many steps, on the end of the text: a twentieth of it, but 512 windows
    at most. That isn't trained on then, so a run can't change to it halfway."""

    save_every: int | str = 50
    """From one checkpoint to the next: a number of steps, or a time such as 90s or 10m."""

    snapshot_every: int | str = "auto"
    """From one snapshot in memory to the next: a number of steps, or a time."""

    replicate_snapshots: int = 0
    """1 sends each of them to another node's memory."""

    hang_after_s: float | None = 60.0
    """How long a step may stand still, in seconds."""

    local_save_every: int | str | None = None
    """Where the run's folder is a URL: from one checkpoint in the local folder to the next."""

    keep_last: int = 3
    """Checkpoints that are kept, at least 2. Older ones are deleted."""

    @property
    def size(self) -> Size:
        """Of the model."""
        known = SIZES[self.model]
        return Size(
            known.layers if self.layers is None else self.layers,
            known.heads if self.heads is None else self.heads,
            known.width if self.width is None else self.width,
            known.context if self.context is None else self.context,
        )


# --- Schedule: a linear rise, then half a cosine down to a tenth


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup: int, steps: int) -> LambdaLR:
    """Scale the learning rate: up to 1 in `warmup` steps, then down to 0.1 at the last of `steps`."""

    def scale(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        progress = min((done - warmup) / max(steps - warmup, 1), 1.0)
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return LambdaLR(optimizer, scale)


# --- Validation: on the end of the text

_HELD_OUT = 20
"""A part in so many of the text is left out of the training."""
_MOST_HELD_OUT = 512
"""In windows; more take long to measure, and say hardly more."""


class Perplexity(dtrain.Mean):
    """Among how many bytes, all equally likely, the model could as well have chosen."""

    def compute(self) -> float:
        return math.exp(super().compute())


def summed_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """The loss of a batch, and over how many bytes it is. Logits would be 256 times as much to send to rank 0."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="sum"), y.numel()


def split(corpus: npt.NDArray[np.uint8], options: Options) -> tuple[Windows, Windows | None]:
    """What is trained on, and what is measured on, if anything is.

    :raises ConfigError: there isn't enough text for that.
    """
    context = options.size.context
    if options.evaluate_every is None:
        return Windows(corpus, context), None
    if options.evaluate_every < 1:
        raise ConfigError(f"--evaluate-every {options.evaluate_every}: must be 1 or more; or leave it out")
    Windows(corpus, context)  # names what is wrong with a --context below 1
    cut = corpus.size - min(corpus.size // _HELD_OUT, _MOST_HELD_OUT * context + 1)
    return Windows(corpus[:cut], context), Windows(corpus[cut:], context)


# --- Training: what every process does


def train(run: dtrain.Run, *, options: Options, corpus: npt.NDArray[np.uint8]) -> None:
    """Train from where the run stands to its last step. Every process calls it, and again after a fault."""
    o, size = options, options.size
    with torch.device("meta"):  # it gets its memory and its values block by block, when it is spread
        bare = GPT(layers=size.layers, heads=size.heads, width=size.width, dropout=o.dropout)
    operations = operations_per_token(bare, layers=size.layers, width=size.width, context=size.context)
    model = run.parallelize(bare)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=o.weight_decay)
    schedule = warmup_cosine(optimizer, warmup=o.warmup, steps=o.steps)
    windows, held_out = split(corpus, o)
    data = run.data(windows, collate=collate, workers=o.workers)
    run.track(model=model, optimizer=optimizer, schedule=schedule)
    peak = peak_of(run.device, o.precision)

    clock = time.perf_counter()
    for step in run.steps(o.steps):
        lr = schedule.get_last_lr()[0]
        for x, y in step.micro_batches(data):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
            step.backward(loss, count=y.numel())
        step.update(optimizer, schedule, clip=o.clip)
        # The last step's: this one's end isn't waited for on a GPU.
        clock, seconds = time.perf_counter(), time.perf_counter() - clock
        speed = step.totals.count / seconds
        step.log(lr=float(lr), tokens_per_s=speed)
        if peak is not None:
            step.log(mfu=speed * operations / (peak * run.world_size))
        if held_out is not None and o.evaluate_every and step.number % o.evaluate_every == 0:
            metrics = {"loss": dtrain.Mean(), "perplexity": Perplexity()}
            found = run.evaluate(model, held_out, metrics, outputs=summed_loss, collate=collate)
            if run.is_first:
                told = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"step {step.number}: loss {step.loss:.4f}, {told}", flush=True)
            clock = time.perf_counter()


# --- Start


def start(options: Options) -> None:
    """Read the text, then hand the training to dtrain."""
    # The text is read before the launch. Every trainer is a fork of this process and finds the array in the
    # memory that it inherits: a trainer that takes a dead one's place reads and copies nothing.
    corpus = read_corpus(options.data)
    split(corpus, options)  # too little text is better said here, once, than by every trainer
    o = options
    dtrain.launch(
        functools.partial(train, options=o, corpus=corpus),
        dtrain.Config(
            dir=o.dir,
            local_dir=o.local_dir,
            global_batch=o.global_batch,
            micro_batch=o.micro_batch,
            seed=o.seed,
            parallel=o.parallel,
            shard_size=o.shard_size,
            precision=o.precision,
            tf32=o.tf32,
            reduction=o.reduction,
            activation_checkpointing=o.activation_checkpointing,
            compile=o.compile,
            cpu_offload=o.cpu_offload,
            save_every=o.save_every,
            snapshot_every=o.snapshot_every,
            replicate_snapshots=o.replicate_snapshots,
            hang_after_s=o.hang_after_s,
            local_save_every=o.local_save_every,
            keep_last=o.keep_last,
            unit="tokens",
        ),
    )


def cli() -> None:
    start(tyro.cli(Options, prog="python -m dtrain.examples.gpt"))


if __name__ == "__main__":
    cli()
