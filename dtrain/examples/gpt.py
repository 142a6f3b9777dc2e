"""A byte-level GPT, trained with dtrain.

The model reads bytes and predicts the next one: 256 words, no tokenizer, about a million parameters. It is
small enough for two CPU cores, and all that matters is in it: dropout, gradient accumulation, clipping, a
schedule. Without --data it learns the source of Python's standard library, which every machine has. The loss
falls from 5.5 to about 2.1 nats a byte in 300 steps.

One process:

    python -m dtrain.examples.gpt --dir runs/gpt

Two processes on one machine:

    torchrun --standalone --nproc-per-node 2 -m dtrain.examples.gpt --dir runs/gpt

Kill any of them while it runs, or start the same command again later: it goes on from the newest checkpoint,
and ends with the weights that it would have had undisturbed. To train on something else:

    python -m dtrain.examples.gpt --dir runs/notes --data notes/ letters.txt --steps 2000

The file reads in the order of the work: options, text, windows, model, schedule, training, start.
"""

from __future__ import annotations

import functools
import math
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
import xxhash
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

import dtrain
from dtrain.errors import ConfigError

VOCABULARY = 256
"""One word for each value that a byte can have."""


# --- Options: each is a flag of the same name, with dashes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a byte-level GPT that survives what happens to its processes."""

    dir: str = "runs/gpt"
    """Folder of the run, or an URL (s3://...): its checkpoints are written here, and found here by the next start."""

    local_dir: str = ""
    """Folder for events and metrics, where the run's is an URL."""

    data: tuple[Path, ...] = ()
    """Files and folders to learn from. Without any: the Python standard library's own source."""

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

    layers: int = 4
    """Blocks of attention and MLP, one upon the other."""

    heads: int = 4
    """Attention heads in a block. The width must be a multiple of twice as many."""

    width: int = 128
    """Features that a position carries through the model."""

    context: int = 128
    """Bytes that the model sees at once."""

    dropout: float = 0.1
    """Share of the features that a pass drops at random."""

    save_every: int | str = 50
    """From one checkpoint to the next: a number of steps, or a time such as 90s or 10m."""

    keep_last: int = 3
    """Checkpoints that are kept, at least 2. Older ones are deleted."""


# --- Text: any files, as one long array of bytes


def standard_library(folder: Path) -> list[Path]:
    """Every module of Python's standard library, sorted, without its tests and the installed packages."""
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return [path for path in sorted(folder.rglob("*.py")) if others.isdisjoint(path.relative_to(folder).parts)]


def text_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted, but for hidden ones and binaries: those with a NUL byte early on."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            with path.open("rb") as file:
                if b"\0" not in file.read(8192):
                    found.append(path)
    return found


def read_corpus(data: Sequence[Path] = ()) -> npt.NDArray[np.uint8]:
    """Read all text into one array, file after file.

    :param data: files, read as they are, and folders, of which all text is read. Empty: the standard library.
    :raises ConfigError: one of them does not exist, cannot be read, or has not a byte of text in it.
    """
    parts: list[npt.NDArray[np.uint8]] = []
    for source in data or [Path(sysconfig.get_path("stdlib"))]:
        if not source.exists():
            raise ConfigError(
                f"--data {source}: there is no such file or folder (looked for {source.absolute()}); correct "
                "the path, or leave --data out to train on Python's standard library"
            )
        try:
            if not data:
                files = standard_library(source)
            elif source.is_dir():
                files = text_files(source)
            else:
                files = [source]
            read = [np.fromfile(file, dtype=np.uint8) for file in files]
        except OSError as error:
            raise ConfigError(f"--data {source}: {error}; make it readable, or name other text") from error
        if not any(part.size for part in read):
            raise ConfigError(
                f"--data {source}: holds no text ({len(files)} files looked at; in a folder, hidden and "
                "binary ones do not count); name a file or a folder that holds some"
            )
        parts += read
    return np.concatenate(parts)


# --- Windows: the samples


class Windows(Dataset[Tensor]):
    """The corpus, cut into windows of context + 1 bytes: the last byte of one is the first of the next.

    :raises ConfigError: the corpus is too short for a single window.
    """

    def __init__(self, corpus: npt.NDArray[np.uint8], context: int) -> None:
        if context < 1:
            raise ConfigError(f"--context {context}: must be 1 or more; it is the bytes seen at once, such as 128")
        if corpus.size < context + 1:
            raise ConfigError(
                f"--context {context}: one window takes {context + 1} bytes, and the text of --data has only "
                f"{corpus.size}; name more text, or a --context of {max(corpus.size - 1, 1)} or less"
            )
        self.corpus = corpus
        self.context = context

    def __len__(self) -> int:
        return (self.corpus.size - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """All samples of a batch in one go: where it exists, it is called in place of __getitem__."""
        starts = np.asarray(indices, dtype=np.int64) * self.context
        windows = self.corpus[starts[:, None] + np.arange(self.context + 1)]
        return list(torch.from_numpy(windows))

    def fingerprint(self) -> str:
        """Tells this text from another of the same length; dtrain saves it with the position in the data."""
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self.corpus).data)


def collate(samples: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Make a batch of windows: what the model sees, and at each place the byte that comes next."""
    windows = torch.stack(list(samples)).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# --- Model: a pre-norm transformer with rotary positions


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by the angle of its place: attention then sees how far apart places are."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)


class Block(nn.Module):
    """Attention, then an MLP, each added to what came in."""

    def __init__(self, *, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        out: Tensor = x + self.dropout(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))
        return out

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # (batch, time, 3 * width) -> three of (batch, heads, time, width / heads) -> (batch, time, width)
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return out


class GPT(nn.Module):
    """Bytes in, for each place the logits of the next byte out.

    :raises ConfigError: the width cannot be shared out among the heads, or the dropout is no share.
    """

    def __init__(self, *, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % (2 * heads):
            raise ConfigError(
                f"--width {width} --heads {heads}: the width must be a multiple of twice the heads; "
                "change one of them, such as --width 128 --heads 4"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"--dropout {dropout}: must be 0 or more and less than 1, such as 0.1")
        self.half_head = width // heads // 2
        self.token = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(heads=heads, width=width, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight", "head.weight")):
                nn.init.zeros_(parameter)  # a block starts as the identity, all bytes as equally likely
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        # The angles are worked out anew each time: as a buffer, DDP would send them round before every pass.
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        speed = torch.arange(self.half_head, device=tokens.device, dtype=torch.float32) / self.half_head
        angles = torch.outer(place, 10_000.0**-speed)
        cos, sin = angles.cos(), angles.sin()
        x = self.dropout(self.token(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


# --- Schedule: a linear rise, then half a cosine down to a tenth


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup: int, steps: int) -> LambdaLR:
    """Scale the learning rate: up to 1 in `warmup` steps, then down to 0.1 at the last of `steps`."""

    def scale(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        progress = min((done - warmup) / max(steps - warmup, 1), 1.0)
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return LambdaLR(optimizer, scale)


# --- Training: what every process does


def train(run: dtrain.Run, *, options: Options, corpus: npt.NDArray[np.uint8]) -> None:
    """Train from where the run stands to its last step. Every process calls it, and again after a fault."""
    o = options
    model = run.parallelize(GPT(layers=o.layers, heads=o.heads, width=o.width, dropout=o.dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=(0.9, 0.95), weight_decay=o.weight_decay)
    schedule = warmup_cosine(optimizer, warmup=o.warmup, steps=o.steps)
    data = run.data(Windows(corpus, o.context), collate=collate)
    run.track(model=model, optimizer=optimizer, schedule=schedule)

    for step in run.steps(o.steps):
        lr = schedule.get_last_lr()[0]
        for x, y in step.micro_batches(data):
            logits = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
            step.backward(loss, count=y.numel())
        step.update(optimizer, schedule, clip=o.clip)
        step.log(lr=float(lr))


# --- Start


def start(options: Options) -> None:
    """Read the text, then hand the training to dtrain."""
    # The text is read before the launch. Every trainer is a fork of this process and finds the array in the
    # memory that it inherits: a trainer that takes a dead one's place reads and copies nothing.
    corpus = read_corpus(options.data)
    Windows(corpus, options.context)  # too little text is better said here, once, than by every trainer
    dtrain.launch(
        functools.partial(train, options=options, corpus=corpus),
        dtrain.Config(
            dir=options.dir,
            local_dir=options.local_dir,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
            seed=options.seed,
            save_every=options.save_every,
            keep_last=options.keep_last,
            unit="tokens",
        ),
    )


def cli() -> None:
    options = tyro.cli(Options, prog="python -m dtrain.examples.gpt")
    try:
        start(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
