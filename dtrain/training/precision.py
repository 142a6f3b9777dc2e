"""The number format that forward passes compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy

from dtrain.config import Config

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_FIRST_SCALE = 2.0**10
"""Losses are sums, of a thousand terms or so, where torch's own 2^16 is meant for means."""


class Precision:
    """What `Config.precision` and `Config.tf32` stand for, on a device."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.dtype = _DTYPES[config.precision]
        self.scaler = GradScaler(device.type, init_scale=_FIRST_SCALE) if self.dtype == torch.float16 else None
        self._device = device
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute what profits from it in the low precision, and losses and norms in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self.dtype)

    def off(self) -> AbstractContextManager[Any]:
        """For backward passes: they take the types that the forward pass took."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, enabled=False)

    def policy(self) -> MixedPrecisionPolicy:
        """For FSDP2: parameters are gathered in the low precision, and gradients added up in float32."""
        if self.dtype == torch.float32:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
