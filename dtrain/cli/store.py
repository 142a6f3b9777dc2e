"""`dtrain store`: the store that torchrun's agents meet at, in a process of its own.

torchrun would put it into the agent of the first node, and its death would be the end of the job. Somewhere else, with
`--rdzv-conf is_host=0` on every node, it lets any node die. dtrain's own processes use it as well (DTRAIN_STORE). It
holds little and does next to nothing; it belongs on a private network, as whoever reaches it can have the agents run
code.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dtrain.errors import ConfigError

PORT = 29400
"""torchrun's own choice."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Serve the store that torchrun's agents meet at, until the end of the process.

    torchrun --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-conf is_host=0 ...
    """

    port: int = PORT
    """Where it listens, on all of the machine's addresses: keep it on a private network."""

    def run(self) -> int:
        try:
            store = dist.TCPStore(
                "127.0.0.1", self.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
            )
        except dist.DistError as error:
            raise ConfigError(f"port={self.port} can't be listened on: {str(error).splitlines()[0]}") from error
        print(f"a store for torchrun at port {store.port}", flush=True)
        while True:
            signal.pause()
