"""`Nodes`: several nodes on one machine, which can be killed, cut off, slowed down and brought back.

Each is a network namespace with an address, a hostname and process ids of its own; a bridge, in a namespace too,
connects them. On the bridge there is also the store that torchrun's agents meet at, so that any node may die. It takes
root and Linux's `ip` and `unshare`; where that isn't allowed, the nodes are processes on 127.0.0.1, which can be killed
and frozen only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from dtrain.cli import relay
from dtrain.cli.store import PORT
from dtrain.elastic.process import die_with
from dtrain.errors import ConfigError

_NET = "10.77.0"
MOST_NODES = 253
"""Of one network: the address behind theirs is the switch's."""
_SWITCH = 254
_PREFIX = "dtrain-node"
_BRIDGE_ADDRESS = "02:00:00:00:00:fe"
"""Given, since by itself it would be that of a port, and change with the ports."""
DELAY_S = 0.2
_INSIDE = """
hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind /dev/null /etc/resolv.conf; shift 2; exec "$@"
"""
_RENDEZVOUS = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4"
"""The settings that `launch/node.sh` has as well, with the reasons."""


class Nodes:
    """To be used in a `with` block, at whose end nothing of them is left.

    :param count: of nodes, numbered from 0.
    :ivar apart: whether they have namespaces of their own.
    :ivar store: address of the store on the bridge.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._relays: dict[int, subprocess.Popen[bytes]] = {}
        self._token = f"{_PREFIX}-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self._folder = Path(tempfile.mkdtemp(prefix="dtrain-nodes-"))
        self.apart = _may_have_namespaces()
        self.store = f"{_NET}.{_SWITCH}:{PORT}" if self.apart else f"127.0.0.1:{_free_port()}"

    def __enter__(self) -> Nodes:
        if self.apart:
            _sweep()
            try:
                self._connect()
            except subprocess.CalledProcessError as error:
                self.__exit__()
                raise ConfigError(f"the namespaces can't be made: {error.stderr.decode().strip()}") from error
        hosts = ["127.0.0.1 localhost\n"]
        for address in (f"{_NET}.{{}}", f"::ffff:{_NET}.{{}}"):
            hosts += [f"{address.format(_SWITCH)} store\n"]
            hosts += [f"{address.format(node + 1)} node{node}\n" for node in range(self.count)]
        (self._folder / "hosts").write_text("".join(hosts))
        port = self.store.rpartition(":")[2]
        self._store = self._popen(_SWITCH, [sys.executable, "-m", "dtrain.cli.main", "store", "--port", port])
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._running):
            self.kill(node)
        for process in (getattr(self, "_store", None), *self._relays.values()):
            if process is not None:
                process.kill()
                process.wait()
        for name in (self._name(_SWITCH), *map(self._name, range(self.count))):
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def address(self, node: int) -> str:
        return f"{_NET}.{node + 1}" if self.apart else "127.0.0.1"

    def start(
        self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None, output: IO[bytes] | None = None
    ) -> int:
        """Run a command on a node. Its end is the end of all that it has started.

        :returns: its process id.
        """
        if self.is_running(node):
            raise ConfigError(f"node {node} runs; kill it first")
        self._running[node] = self._popen(node, command, env, output)
        return self._running[node].pid

    def kill(self, node: int) -> None:
        """All of its processes at once, as when its power fails. Its network stays: `cut` it before, for silence."""
        if node not in self._running:
            raise ConfigError(f"node {node} doesn't run")
        process = self._running.pop(node)
        process.kill()
        process.wait()

    def is_running(self, node: int) -> bool:
        return node in self._running and self._running[node].poll() is None

    def wait(self, node: int, timeout_s: float | None = None) -> int:
        """For the end of its command. :returns: the exit code."""
        return self._running[node].wait(timeout_s)

    def worst(self) -> int:
        """The largest exit code of the commands that have come to their end; 1 if none has."""
        return max((abs(process.wait()) for process in self._running.values()), default=1)

    def cut(self, node: int) -> None:
        """Take it off the network: nothing of it is heard any more, and nothing is refused either."""
        self._link(node, "down")

    def delay(self, node: int, seconds: float = DELAY_S) -> None:
        """Have all that goes to it and all that comes from it take so much longer."""
        if node in self._relays:
            self._mend(node)
        port, wire, end = f"port{node}", f"wire{node}", f"end{node}"
        self._switch("link", "add", wire, "type", "veth", "peer", "name", end)
        self._switch("link", "set", wire, "master", "bridge", "up")
        # What comes in at these two is the relay's to pass on, and not for the bridge's namespace to answer.
        for device in (port, end):
            self._switch("link", "set", device, "nomaster", "arp", "off", "up")
        command = [sys.executable, str(Path(relay.__file__)), port, end, str(seconds)]
        self._relays[node] = subprocess.Popen(
            ["ip", "netns", "exec", self._name(_SWITCH), *command],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(die_with, os.getpid()),
        )

    def heal(self, node: int) -> None:
        """After `cut` and `delay`."""
        if node in self._relays:
            self._mend(node)
        self._link(node, "up")

    def _mend(self, node: int) -> None:
        process = self._relays.pop(node)
        process.kill()
        process.wait()
        self._switch("link", "delete", f"wire{node}")
        self._switch("link", "set", f"port{node}", "arp", "on", "master", "bridge")

    def freeze(self, node: int) -> None:
        """Stop all of its processes, as on a machine that is swapping, or a virtual one that is being moved."""
        self._signal(node, signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        self._signal(node, signal.SIGCONT)

    def processes(self, node: int) -> list[int]:
        """The ids of its processes, as this machine sees them."""
        return list(_below(self._running[node].pid)) if node in self._running else []

    def _signal(self, node: int, number: signal.Signals) -> None:
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _connect(self) -> None:
        switch = self._name(_SWITCH)
        _ip("netns", "add", switch)
        self._switch("link", "add", "bridge", "address", _BRIDGE_ADDRESS, "type", "bridge")
        self._switch("address", "add", f"{_NET}.{_SWITCH}/24", "dev", "bridge")
        for device in ("lo", "bridge"):
            self._switch("link", "set", device, "up")
        for node in range(self.count):
            name, port = self._name(node), f"port{node}"
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            self._switch("link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def _link(self, node: int, state: str) -> None:
        self._switch("link", "set", f"port{node}", state)

    def _switch(self, *arguments: str) -> None:
        """Change something where the bridge is."""
        if not self.apart:
            raise ConfigError(
                "nodes on 127.0.0.1 have no network of their own, that could be cut off or slow: run as root, with "
                "`ip` and `unshare` installed"
            )
        _ip("-n", self._name(_SWITCH), *arguments)

    def _name(self, node: int) -> str:
        return f"{self._token}-{node}"

    def _popen(
        self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None, output: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        around: list[str] = []
        if self.apart:
            apart = ("unshare", "--uts", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
            hostname = "store" if node == _SWITCH else f"node{node}"
            inside = ("sh", "-ec", _INSIDE, "sh", hostname, str(self._folder / "hosts"))
            around = ["ip", "netns", "exec", self._name(node), *apart, *inside]
        network = {"DTRAIN_STORE": self.store, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.apart:
            network["GLOO_SOCKET_IFNAME"] = "eth0"
        return subprocess.Popen(
            [*around, *command],
            env={"OMP_NUM_THREADS": "1"} | dict(os.environ) | network | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=functools.partial(die_with, os.getpid()),
        )


def agent(nodes: Nodes, node: int, arguments: Sequence[str], *, least: int, most: int, nproc: int = 1) -> list[str]:
    """torchrun's command for a node, with the settings of `launch/node.sh`."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", f"{least}:{most}", "--nproc-per-node", str(nproc), "--max-restarts", "100"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", nodes.store, "--rdzv-id", "dtrain"),
        *("--rdzv-conf", f"is_host=0,{_RENDEZVOUS}", "--local-addr", nodes.address(node)),
        *arguments,
    ]


def _may_have_namespaces() -> bool:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    return subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False).returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _sweep() -> None:
    """Remove the namespaces of those that were killed before they could."""
    for path in Path("/run/netns").glob(f"{_PREFIX}-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # somebody else is at it
                _ip("netns", "delete", path.name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _below(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _below(int(child))
