"""`Placement`: where a process stands in the job that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where this process stands in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: tuple[str, int] | None = None
    """Address of the store that all nodes' processes share; None for a process that is alone."""
    job: str = ""
    """What torchrun calls the job: a store may serve several."""
    restarts: int = 0
    """How often torchrun has started this group of processes again."""
    most_restarts: int = 0
    """How often it would."""
    local_world_size: int = 1
    """How many ranks there are on this machine."""
    node: int = 0
    """The number of this machine among `nodes`."""
    nodes: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Placement:
        """:raises ConfigError: several processes were started, but not by torchrun."""
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls()
        own = env.get("DTRAIN_STORE", "")
        host, _, port = own.rpartition(":")
        if own and not (host and port.isdigit()):
            raise ConfigError(f"DTRAIN_STORE={own!r} must be HOST:PORT, of the store that torchrun's agents meet at")
        if not own and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            if int(env.get("WORLD_SIZE", "1")) == 1:
                return cls()
            raise ConfigError(
                "several processes were started without torchrun's store; start them with torchrun, and without "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or set DTRAIN_STORE=HOST:PORT to that of `dtrain store`"
            )
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            store=(host, int(port)) if own else (env["MASTER_ADDR"], int(env["MASTER_PORT"])),
            job=env.get("TORCHELASTIC_RUN_ID", ""),
            restarts=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            most_restarts=int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            node=int(env.get("GROUP_RANK", "0")),
            nodes=int(env.get("GROUP_WORLD_SIZE", "1")),
        )
