"""A GPT over bytes: a pre-norm transformer with rotary positions, in sizes from a million parameters to a billion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.errors import ConfigError

VOCABULARY = 256
"""One word for each value that a byte can have."""


@dataclass(frozen=True)
class Size:
    """Of a model."""

    layers: int
    heads: int
    width: int
    context: int


SIZES = {
    "1m": Size(4, 4, 128, 128),
    "10m": Size(6, 6, 384, 256),
    "30m": Size(10, 8, 512, 512),
    "125m": Size(18, 12, 768, 1024),
    "350m": Size(28, 16, 1024, 1024),
    "1b": Size(20, 16, 2048, 2048),
}
"""By the number of parameters. They are those of common GPTs but for the vocabulary, whose place more layers take."""


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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first values, also of a model that was made on the meta device: a block starts as the identity."""
        for into in (self.query_key_value, self.mlp_in):
            nn.init.normal_(into.weight, std=into.in_features**-0.5)
        for out in (self.attention_out, self.mlp_out):
            nn.init.zeros_(out.weight)

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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first values of what isn't in the blocks: all bytes are as equally likely."""
        nn.init.normal_(self.token.weight, std=self.token.embedding_dim**-0.5)
        nn.init.zeros_(self.head.weight)

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


def operations_per_token(model: nn.Module, *, layers: int, width: int, context: int) -> int:
    """Floating-point operations of a forward and a backward pass, as Chowdhery et al., "PaLM" (2022), appendix B, count
    them for the utilisation of a model: 6 for each parameter, and attention's, causal or not; none that is done twice.
    """
    return 6 * sum(parameter.numel() for parameter in model.parameters()) + 12 * layers * width * context


_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}
"""Operations per second in bf16 and fp16, dense, by their makers' data sheets."""


def peak_of(device: torch.device, precision: str) -> float | None:
    """Operations per second that a GPU is made for; None where that isn't known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
