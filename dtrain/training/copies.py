"""`Copies`: are the ranks' copies of the parameters still the same?

Under DDP all ranks hold the same parameters, and under HSDP those with the same part of a shard do. They train on the
same gradients, so they stay equal to the last bit, unless a machine computes or remembers something wrong. Each rank
hashes what it holds; that a hash differs is enough to know.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import xxhash

from dtrain.checkpoint.manager import from_all_ranks
from dtrain.checkpoint.plan import local_part
from dtrain.elastic.failure import GoBack
from dtrain.errors import Unreliable
from dtrain.observe.events import Events, say
from dtrain.training.exchange import Exchange
from dtrain.training.parallel import Parallel

_SUSPECTS = "suspects"
_MOST_ERRORS = 2
"""Of a rank, until its machine isn't trusted any more."""


class Copies:
    """One rank's view of them.

    :param every: distance between two comparisons, in steps; None compares nothing.
    :param exchange: knows what tells a rank's own gradients from any others.
    :param notes: a store that outlives generations; None where there is one process alone.
    :param forget: drops what is in memory, and waits for what is being saved.
    """

    def __init__(
        self,
        parallel: Parallel,
        every: int | None,
        exchange: Exchange,
        events: Events,
        notes: Callable[[], dist.Store | None],
        forget: Callable[[], None],
    ) -> None:
        self._parallel = parallel
        self._every = every
        self._exchange = exchange
        self._events = events
        self._notes = notes
        self._forget = forget
        self._compared = 0
        self._parameters: list[torch.nn.Parameter] | None = None
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
            self._name_suspects(step, found)

    def _tensors(self) -> list[torch.Tensor]:
        """What this rank holds of the parameters."""
        if self._parameters is None:  # to go through the modules takes as long as the hash
            self._parameters = [p for model in self._parallel.models for p in model.module.parameters()]
        return [local_part(parameter).detach() for parameter in self._parameters]

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
        hosts = from_all_ranks(socket.gethostname())
        odd = _odd(found)
        if dist.get_rank() == 0:
            self._events.emit("diverged", step=step, ranks=odd, digests=[f"{digest:016x}" for _, digest in found])
        self._forget()
        if odd:
            self._count_errors(step, [(rank, hosts[rank]) for rank in odd])
            names = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in odd)
            which = f"those of {names} are not those of the others"
        else:
            marks = from_all_ranks(self._exchange.marks())
            notes = self._notes() if dist.get_rank() == 0 else None
            if notes is not None:
                with contextlib.suppress(dist.DistError):  # it is too long, with thousands of ranks
                    notes.set(_SUSPECTS, json.dumps({"step": step, "copies": found, "hosts": hosts, "marks": marks}))
            which = "which of them are wrong is known when this step comes again"
        dist.barrier()  # who raises first has the others killed, whatever they are at
        raise GoBack(f"the copies of the parameters differ after step {step}: {which}; back to the last checkpoint")

    def _name_suspects(self, step: int, found: list[tuple[int, int]]) -> None:
        """Say who was wrong when it came to this step before, now that it is known what is right. All ranks must.

        A parameter that is wrong makes its rank's own gradient wrong in the next step, and by it the copies of all
        ranks. So it was the rank whose gradients were the first to be others than now; and if none were, the one whose
        copy was another.
        """
        note: list[Any] = [self._noted()]
        dist.broadcast_object_list(note, src=0)
        noted, rank = note[0], dist.get_rank()
        odd: list[int] = []
        if len(noted["hosts"]) == dist.get_world_size():
            now, then = self._exchange.marks(), {int(at): marks for at, marks in noted["marks"][rank].items()}
            differ = [at for at in sorted(now.keys() & then.keys()) if now[at] != then[at]]
            first = from_all_ranks(differ[0] if differ else step + 1)
            right = [[part, digest] for part, digest in found]
            odd = [one for one, at in enumerate(first) if at == min(first) <= step] or [
                one for one, copy in enumerate(noted["copies"]) if copy != right[one]
            ]
            parts = [part for part, _ in found]  # where all copies of a part were wrong, nobody can tell
            odd = [one for one in odd if [parts[other] for other in odd].count(parts[one]) < parts.count(parts[one])]
        notes = self._notes() if rank == 0 else None
        if notes is not None:
            notes.delete_key(_SUSPECTS)
        self._count_errors(step, [(one, noted["hosts"][one]) for one in odd])

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


def digest_of(tensors: Iterable[torch.Tensor]) -> int:
    """A hash of the bytes of tensors, in 63 bits."""
    state = xxhash.xxh3_64()
    for tensor in tensors:
        data = tensor.detach()
        if data.numel() == 0:  # a rank's part of what is shorter than there are ranks
            continue
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
