"""`Copies`: are the ranks' copies of the parameters still the same?

Under DDP all ranks hold the same parameters, and under HSDP those with the same part of a shard do. They train on the
same gradients, so they stay equal to the last bit, unless a machine computes or remembers something wrong. Each rank
hashes what it holds; that a hash differs is enough to know.
"""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import xxhash

from dtrain.checkpoint.plan import local_part
from dtrain.elastic.failure import GoBack
from dtrain.errors import Unreliable
from dtrain.observe.events import Events, say
from dtrain.training.parallel import Parallel

_SUSPECTS = "suspects"
_BLOCK = 256
"""Elements."""
_MOST_ERRORS = 2
"""Of a rank, until its machine isn't trusted any more."""


class Copies:
    """One rank's view of them.

    :param every: distance between two comparisons, in steps; None compares nothing.
    :param notes: a store that outlives generations; None where there is one process alone.
    :param forget: drops what is in memory, and waits for what is being saved.
    """

    def __init__(
        self,
        parallel: Parallel,
        every: int | None,
        events: Events,
        notes: Callable[[], dist.Store | None],
        forget: Callable[[], None],
    ) -> None:
        self._parallel = parallel
        self._every = every
        self._events = events
        self._notes = notes
        self._forget = forget
        self._compared = 0
        self._again = 0
        """The step at which it will be known who was wrong before."""

    @property
    def _looks(self) -> bool:
        return self._every is not None and self._parallel.replicated

    def begin(self) -> None:
        """A generation begins. All ranks must reach it."""
        if self._looks:
            again: list[Any] = [(self._noted() or {}).get("step", 0)]
            dist.broadcast_object_list(again, src=0)
            self._again = again[0]

    def due(self, step: int) -> bool:
        """Whether they are to be compared after a step, saved or not."""
        return self._every is not None and (step % self._every == 0 or step == self._again)

    def compare(self, step: int) -> None:
        """Compare them now, if there are any. All ranks must reach it, when `step` is done.

        :raises GoBack: they differ; the run goes back to the last checkpoint, at which they didn't.
        :raises Unreliable: a rank's copy was another one for the second time.
        """
        if not self._looks or self._compared == step:
            return
        self._compared = step
        gathered = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
        dist.all_gather(list(gathered), torch.tensor([self._part(), digest_of(self._tensors())], dtype=torch.int64))
        found: list[tuple[int, int]] = [(part, digest) for part, digest in gathered.tolist()]
        if len(set(found)) > len({part for part, _ in found}):
            self._disagree(step, found)
        if step == self._again:
            self._name_suspects(step)

    def _tensors(self) -> list[torch.Tensor]:
        """What this rank holds of the parameters."""
        return [local_part(p).detach() for model in self._parallel.models for p in model.module.parameters()]

    def _noted(self) -> dict[str, Any] | None:
        """On rank 0: what was found when it wasn't clear who was wrong, and isn't yet."""
        notes = self._notes() if dist.get_rank() == 0 else None
        if notes is None or not notes.check([_SUSPECTS]):
            return None
        noted: dict[str, Any] = json.loads(notes.get(_SUSPECTS))
        return noted

    def _part(self) -> int:
        """Which part of the parameters this rank holds."""
        mesh, place = self._parallel.mesh, 0
        for name in mesh.mesh_dim_names or () if mesh is not None else ():
            assert mesh is not None
            if name != "replicate":
                place = place * mesh[name].size() + mesh[name].get_local_rank()
        return place

    def _disagree(self, step: int, found: list[tuple[int, int]]) -> NoReturn:
        hosts = _from_all(socket.gethostname())
        odd = _odd(found)
        if dist.get_rank() == 0:
            self._events.emit("diverged", step=step, ranks=odd, digests=[f"{digest:016x}" for _, digest in found])
        if odd:
            self._count_errors(step, [(rank, hosts[rank]) for rank in odd])
            names = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in odd)
            which = f"those of {names} are not those of the others"
        else:
            self._note(step, found, hosts)
            which = "which of them are wrong is known when this step comes again"
        self._forget()
        raise GoBack(f"the copies of the parameters differ after step {step}: {which}; back to the last checkpoint")

    def _note(self, step: int, found: list[tuple[int, int]], hosts: list[str]) -> None:
        """Remember what the copies are where they differ first."""
        split = {part for part, _ in found if len({digest for at, digest in found if at == part}) > 1}
        ranks = [rank for rank, (part, _) in enumerate(found) if part == min(split)]
        mine, number, start = self._tensors(), 0, 0

        def first_difference(digests: list[int]) -> int:
            """The place of the first digest that isn't the same on all of these ranks. All ranks must reach it."""
            of_ranks = zip(*(theirs for rank, theirs in enumerate(_from_all(digests)) if rank in ranks), strict=True)
            return next(place for place, theirs in enumerate(of_ranks) if len(set(theirs)) > 1)

        number = first_difference([digest_of([tensor]) for tensor in mine])
        flat = mine[number].reshape(-1)
        start = _BLOCK * first_difference([digest_of([part]) for part in flat.split(_BLOCK)])
        values = _from_all(flat[start : start + _BLOCK].double().tolist())
        notes = self._notes() if dist.get_rank() == 0 else None
        if notes is not None:
            note = {"step": step, "ranks": ranks, "hosts": hosts, "tensor": number, "start": start}
            notes.set(_SUSPECTS, json.dumps(note | {"values": [values[rank] for rank in ranks]}))

    def _name_suspects(self, step: int) -> None:
        """Say who was wrong when it came to this step before, now that it is known what is right. All ranks must.

        What the wrong rank has contributed to the gradients since was wrong as well, and so all copies were; but only
        its own had the error itself, and was the farthest from what is right.
        """
        note: list[Any] = [self._noted()]
        dist.broadcast_object_list(note, src=0)
        noted = note[0]
        flat = self._tensors()[noted["tensor"]].reshape(-1)
        right = flat[noted["start"] : noted["start"] + _BLOCK].double()
        off = [
            float((torch.tensor(values, dtype=torch.float64) - right).abs().sum().nan_to_num(math.inf))
            for values in noted["values"]
        ]
        odd = [(rank, noted["hosts"][rank]) for rank, by in zip(noted["ranks"], off, strict=True) if by > min(off)]
        # A rank may hold another part: those that hold this one know.
        odd = _from_all(odd)[noted["ranks"][0] % dist.get_world_size()]
        notes = self._notes() if dist.get_rank() == 0 else None
        if notes is not None:
            notes.delete_key(_SUSPECTS)
        self._count_errors(step, odd)

    def _count_errors(self, step: int, odd: list[tuple[int, str]]) -> None:
        """All ranks must reach it. :raises Unreliable: it was the second time for one of them."""
        if not odd:
            return
        errors: list[Any] = [0] * len(odd)
        if dist.get_rank() == 0:
            notes = self._notes()
            for number, (rank, host) in enumerate(odd):
                errors[number] = 1 if notes is None else notes.add(f"errors/{host}/{rank}", 1)
                self._events.emit("erred", step=step, rank=rank, host=host, times=errors[number])
                say(f"rank {rank} ({host}) had computed wrong parameters by step {step}")
        dist.broadcast_object_list(errors, src=0)
        for (rank, host), times in zip(odd, errors, strict=True):
            if times >= _MOST_ERRORS:
                raise Unreliable(
                    f"rank {rank} on {host} has computed wrong parameters {times} times, by step {step} at last: its "
                    "machine can't be trusted, unless the code does something else on this rank. The last checkpoint "
                    "is from before; start without that machine"
                )


def _from_all(mine: Any) -> list[Any]:
    """What each rank has. All ranks must reach it."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def digest_of(tensors: Iterable[torch.Tensor]) -> int:
    """A hash of the bytes of tensors, in 63 bits."""
    state = xxhash.xxh3_64()
    for tensor in tensors:
        data = tensor.detach()
        if data.is_cuda:  # XOR of the bits, on the device: enough to see that one has flipped
            state.update(torch.hash_tensor(data).cpu().numpy().tobytes())
        else:
            state.update(data.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.intdigest() >> 1


def _odd(found: list[tuple[int, int]]) -> list[int]:
    """The ranks that a clear majority of those with the same part disagrees with; none if there is no majority."""
    odd = []
    for part in {at for at, _ in found}:
        digests = Counter(digest for at, digest in found if at == part)
        (most, count), *others = digests.most_common()
        if others and count > sum(digests.values()) / 2:
            odd += [rank for rank, (at, digest) in enumerate(found) if at == part and digest != most]
        elif others:
            return []
    return sorted(odd)
