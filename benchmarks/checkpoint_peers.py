"""What `checkpoint.py` measures with: a state to save, the machine's limits, and the engines beside dtrain.

Every engine is used as its documentation has it, with the options that turned out the quickest on this kind of machine:

- `dcp.save` and `dcp.load` as they are, files synced (their default). Cached plans save a few milliseconds with two
  ranks, and two writing threads are no faster, but lose the errors of one of them: so neither.
- `dcp.async_save` with no stager given: it makes one, and new memory, for every save.
- `dcp.async_save` with a `DefaultStager` that is kept, so that its memory is warm from the second save on; shared
  memory, so that the same one serves the writing thread and the writing process. The other stager that can keep its
  memory (`BlockingAsyncStager`, also the one inside `FileSystemWriter`) pins it and so works only beside a GPU.
- `torch_checkpointing` with its own defaults but for O_DIRECT, with which its writer fails on some disks ("Invalid
  argument") and was no faster on others. It copies in a thread, writes in a process and never calls fsync. Its `save`
  returns at once, but no weight may change until the copy is there (`manager.lock()`): that is the stall. It gets no
  resharder, with which it would gather and compare what the ranks hold; so every rank reads its own file again.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.checkpoint.plan import local_part

LAYERS = 16
CONTEXT = 1024
PIECE_BYTES = 16 << 20
"""What the plain write and the plain read hand to the kernel at a time; larger pieces were no faster."""


class Block(nn.Module):
    """The tensors of a transformer's layer. It computes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Net(nn.Module):
    """196 tensors from 1 KiB to a third of the whole, as in a GPT."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)


class Training:
    """A model and its AdamW in the middle of a training.

    :param nbytes: of parameters and moments together, over all ranks.
    :param sharded: every rank holds its part of each tensor, by FSDP2; otherwise each holds all of them.
    """

    def __init__(self, nbytes: int, *, sharded: bool, device: torch.device) -> None:
        elements = nbytes // 3 // 4
        width = max(64, int((0.6 * elements / (12 * LAYERS)) ** 0.5) // 64 * 64)
        layers = LAYERS * (12 * width + 13) * width + (CONTEXT + 2) * width
        with torch.device("meta"):
            self.model = Net(width, max(2, (elements - layers) // width // 2 * 2))
        if sharded:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        for parameter in self.model.parameters():
            moments = (torch.empty_like(parameter, requires_grad=False) for _ in range(2))
            self.optimizer.state[parameter] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
            self.optimizer.state[parameter]["step"] = torch.tensor(1000.0)
        self.tensors = [local_part(tensor.detach()) for tensor in self._all()]
        """What this rank holds."""
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        seed = dist.get_rank() if sharded else 0
        pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).to(device)
        for number, tensor in enumerate(tensor for tensor in self.tensors if tensor.dim()):
            # Every place in it differs from its neighbours, and every tensor from the others.
            for part in tensor.view(-1).split(pattern.numel()):
                part.copy_(pattern[: part.numel()]).add_(number)

    def _all(self) -> list[Tensor]:
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *kept]

    def state_dict(self) -> dict[str, Any]:
        """What the peers are given: the cheapest that their users could write."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def blank(self) -> None:
        """Forget everything, so that only a load can bring it back."""
        for tensor in self.tensors:
            tensor.zero_()


class Limits:
    """What the machine can do with one rank's bytes: copy them, write them, read them."""

    def __init__(self, training: Training) -> None:
        self._training = training
        cuda = training.tensors[0].is_cuda
        # In the place of each tensor, a gap to the next multiple of 64 bytes included, as in a shard file.
        places = [-(-tensor.nbytes // 64) * 64 for tensor in training.tensors]
        self.memory = torch.empty(sum(places), dtype=torch.uint8, pin_memory=cuda)
        self.memory.zero_()
        self.copies = [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(self.memory.split(places), training.tensors, strict=True)
        ]

    def copy(self) -> None:
        for tensor, copy in zip(self._training.tensors, self.copies, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._training.tensors[0].is_cuda:
            torch.cuda.synchronize()

    def write(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            left = memoryview(self.memory.numpy().data)
            while left:
                left = left[os.write(descriptor, left[:PIECE_BYTES]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            left, offset = memoryview(self.memory.numpy().data), 0
            while left:
                got = os.preadv(descriptor, [left[:PIECE_BYTES]], offset)
                left, offset = left[got:], offset + got
        finally:
            os.close(descriptor)

    def differ(self) -> int:
        """How many tensors are not what the copies hold."""
        pairs = zip(self._training.tensors, self.copies, strict=True)
        return sum(not torch.equal(tensor.cpu(), copy) for tensor, copy in pairs)


class Engine(Protocol):
    """Something that saves and loads. All ranks call each method, in the same order.

    A new one is made from the training and an empty folder of its own, which all ranks share.
    """

    def save(self, training: Training) -> float:
        """:returns: for how many seconds the training was held up."""

    def under_way(self) -> bool:
        """Whether the save isn't finished on this rank."""

    def wait(self) -> None:
        """Until the save is finished, and durable where the engine has that."""

    def drop(self) -> None:
        """Delete what was saved."""

    def load(self, training: Training) -> None:
        """The save before, into the training's own tensors."""

    def close(self) -> None:
        """End its threads and processes."""


class Peer:
    """What the peers have in common.

    :ivar path: of the newest save.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._future: Future[Any] | None = None
        # Its collectives run in a thread of the engine, beside those of this benchmark.
        self._group = dist.new_group(backend="gloo")
        self.path = folder

    def _next(self) -> str:
        self._count += 1
        self.path = self._folder / str(self._count)
        return str(self.path)

    def under_way(self) -> bool:
        return self._future is not None and not self._future.done()

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()

    def drop(self) -> None:
        dist.barrier(self._group)
        if dist.get_rank() == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        pass

    def load(self, training: Training) -> None:
        dcp.load(training.state_dict(), checkpoint_id=self.path)


class Save(Peer):
    """`dcp.save`."""

    def save(self, training: Training) -> float:
        path = self._next()
        started = time.perf_counter()
        dcp.save(training.state_dict(), checkpoint_id=path)
        return time.perf_counter() - started


class AsyncSave(Peer):
    """`dcp.async_save`, by a thread and with a stager for each save."""

    kind = AsyncCheckpointerType.THREAD
    stager: DefaultStager | None = None

    def save(self, training: Training) -> float:
        path = self._next()
        started = time.perf_counter()
        found = dcp.async_save(
            training.state_dict(),
            checkpoint_id=path,
            process_group=self._group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )
        if isinstance(found, AsyncSaveResponse):
            found.staging_completion.result()
            found = found.upload_completion
        self._future = found
        return time.perf_counter() - started


class CachedAsyncSave(AsyncSave):
    """By a thread, with a stager that is kept."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.stager = _kept_stager()


class ProcessAsyncSave(CachedAsyncSave):
    """By a process, with a stager that is kept."""

    kind = AsyncCheckpointerType.PROCESS


_stager: DefaultStager | None = None


def _kept_stager() -> DefaultStager:
    """One for all engines of this process: they take turns, and memory is short."""
    global _stager
    if _stager is None:
        cuda = torch.cuda.is_available()
        # Keywords, since the order is of no help to a reader; without a GPU, all but shared memory are refused.
        _stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
    return _stager


class TorchCheckpointing(Peer):
    """The package torch_checkpointing.

    :ivar returned_s: after how long the last call of `save` returned, with the copy still under way.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self.returned_s = 0.0

    def save(self, training: Training) -> float:
        path = self._next()
        started = time.perf_counter()
        self._future = self._manager.save(path, training.state_dict())
        self.returned_s = time.perf_counter() - started
        with self._manager.lock():
            pass
        return time.perf_counter() - started

    def load(self, training: Training) -> None:
        self._manager.load(str(self.path), into=training.state_dict())

    def close(self) -> None:
        self._manager.close()
