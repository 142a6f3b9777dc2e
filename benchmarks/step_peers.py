"""The loops that dtrain's is measured beside: one written by hand, on DDP and on FSDP2, and those of two frameworks.

All are the ordinary loop, written well: a DistributedSampler and a DataLoader, no exchange of gradients before a step's
last micro-batch, a mean loss, clipping, AdamW, a schedule. They save nothing and show nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dtrain.examples.corpus import Windows, collate
from dtrain.examples.gpt import warmup_cosine
from dtrain.examples.transformer import GPT

LR = 1e-3
WARMUP = 20


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2, block by block."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class ByHand:
    """The loop that is written by hand.

    :param layout: `ddp` or `fsdp`.
    :param accumulate: micro-batches of a rank in a step.
    """

    def __init__(
        self, model: GPT, layout: str, dataset: Windows, micro_batch: int, accumulate: int, device: torch.device
    ) -> None:
        self.layout, self.accumulate, self.device = layout, accumulate, device
        sampler: DistributedSampler[int] = DistributedSampler(dataset, shuffle=True, drop_last=True)
        loader = DataLoader(
            dataset, batch_size=micro_batch, sampler=sampler, num_workers=0, collate_fn=collate, drop_last=True
        )
        self.batches = self._endless(loader, sampler)
        self.optimizer: Any
        self.model: Any
        self.prepare(model.to(device))
        self.schedule = warmup_cosine(self.optimizer, warmup=WARMUP, steps=1000)

    @staticmethod
    def _endless(loader: DataLoader[Tensor], sampler: DistributedSampler[int]) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    def prepare(self, model: GPT) -> None:
        if self.layout == "ddp":
            self.model = DistributedDataParallel(model)
        else:
            self.model = shard(model, init_device_mesh(self.device.type, (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def apart(self, last: bool) -> AbstractContextManager[Any]:
        """Passes whose gradients stay on their rank, but for the last."""
        if self.layout == "ddp":
            return contextlib.nullcontext() if last else self.model.no_sync()
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def step(self) -> None:
        for micro_batch in range(self.accumulate):
            x, y = (part.to(self.device, non_blocking=True) for part in next(self.batches))
            with self.apart(last=micro_batch == self.accumulate - 1):
                logits = self.model(x)
                self.backward(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / self.accumulate)
        self.clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


class Fabric(ByHand):
    """Lightning Fabric, with its strategies for DDP and for FSDP2."""

    def prepare(self, model: GPT) -> None:
        import lightning_fabric
        from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

        def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
            return shard(model, mesh["data_parallel"])

        ranks = dist.get_world_size()
        strategy = (
            DDPStrategy()
            if self.layout == "ddp"
            else ModelParallelStrategy(split, data_parallel_size=ranks, tensor_parallel_size=1)
        )
        accelerator = "cuda" if self.device.type == "cuda" else "cpu"
        self.fabric = lightning_fabric.Fabric(accelerator=accelerator, devices=ranks, strategy=strategy)
        self.fabric.launch()
        self.model = self.fabric.setup_module(model)
        self.optimizer = self.fabric.setup_optimizers(torch.optim.AdamW(self.model.parameters(), lr=LR))

    def apart(self, last: bool) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = self.fabric.no_backward_sync(self.model, enabled=not last)
        return found

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def clip(self) -> None:
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)


class Accelerate(ByHand):
    """Hugging Face Accelerate. It has FSDP2 on GPUs only."""

    def prepare(self, model: GPT) -> None:
        import accelerate

        options: dict[str, Any] = {}
        if self.layout == "fsdp":
            options["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
            )
        self.accelerator = accelerate.Accelerator(cpu=self.device.type == "cpu", **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def apart(self, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)


def peers_of(layout: str, device: torch.device) -> dict[str, type[ByHand]]:
    """Those that have a layout."""
    found: dict[str, type[ByHand]] = {"by hand": ByHand, "Fabric": Fabric}
    if layout == "ddp" or device.type == "cuda":
        found["Accelerate"] = Accelerate
    return found
