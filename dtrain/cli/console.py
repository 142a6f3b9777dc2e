"""`dtrain nodes`: a training on the several nodes of `Nodes`, and what can be done to them while it runs.

dtrain nodes --count 3 --nodes 2:3 -- train.py --my-options
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, Queue

from tyro.conf import Positional

from dtrain.cli.nodes import MOST_NODES, Nodes, agent
from dtrain.errors import ConfigError

_COMMANDS = "kill, start, cut, delay, heal, freeze, thaw"


@dataclass(frozen=True, kw_only=True)
class OnNodes:
    """Run a training script on several nodes of this one machine, and do to them what happens to nodes.

    While it runs, it takes commands: kill N, start N, cut N, delay N, heal N, freeze N, thaw N, quit. The last one, and
    Ctrl-C, are a power failure of all nodes: nothing is saved. What goes to a node that is delayed, and what comes from
    it, is under way for 0.2 s.
    """

    count: int = 3
    """How many nodes there are."""

    nodes: str = ""
    """How many of them the training needs and takes, as MIN:MAX; by default all but one of them, and all. Those above
    MAX wait as spares."""

    nproc: int = 1
    """Processes on each node."""

    script: Positional[tuple[str, ...]] = field(default=())
    """What torchrun is to run, with its arguments."""

    def run(self) -> int:
        least, _, most = (self.nodes or f"{max(1, self.count - 1)}:{self.count}").partition(":")
        if not least.isdigit() or not (most or least).isdigit():
            raise ConfigError(f"nodes={self.nodes!r}: give how many nodes the training needs and takes, such as 2:3")
        if not 1 <= self.count <= MOST_NODES or self.nproc < 1:
            raise ConfigError(f"count={self.count}, nproc={self.nproc}: give 1 or more, and at most {MOST_NODES} nodes")
        if not 1 <= int(least) <= int(most or least):
            raise ConfigError(f"nodes={self.nodes!r}: give MIN:MAX with a MIN of 1 or more, and no more than MAX")
        if int(least) > self.count:
            raise ConfigError(f"nodes={self.nodes!r}: {self.count} nodes are made, and can't be as many as are needed")
        if not self.script:
            raise ConfigError("there is no script to run: dtrain nodes -- train.py")
        with Nodes(self.count) as nodes:
            if not nodes.apart:
                print("[nodes] on 127.0.0.1: without root they can be killed and frozen only", file=sys.stderr)

            def start(node: int) -> None:
                command = agent(nodes, node, self.script, least=int(least), most=int(most or least), nproc=self.nproc)
                nodes.start(node, command)

            try:
                for node in range(self.count):
                    start(node)
                print(
                    f"[nodes] {self.count} nodes, {least}:{most or least} needed; type {_COMMANDS} with a number, or "
                    "quit",
                    file=sys.stderr,
                )
                lines: Queue[str] = Queue()
                threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
                while any(map(nodes.is_running, range(self.count))):
                    with contextlib.suppress(Empty):
                        self._obey(lines.get(timeout=0.5), nodes, start)
            except KeyboardInterrupt:
                print("[nodes] Ctrl-C: the power of all nodes fails, nothing is saved", file=sys.stderr)
                raise
            return nodes.worst()

    def _obey(self, line: str, nodes: Nodes, start: Callable[[int], None]) -> None:
        """Do what was typed."""
        known = {"start": start} | {name: getattr(nodes, name) for name in _COMMANDS.split(", ") if name != "start"}
        match line.split():
            case ["quit"]:
                for node in range(self.count):
                    if nodes.is_running(node):
                        nodes.kill(node)
            case [do, number] if do in known and number.isdigit() and int(number) < self.count:
                try:
                    known[do](int(number))
                    print(f"[nodes] {do} {number}: done", file=sys.stderr)
                except (ConfigError, subprocess.CalledProcessError) as error:
                    print(f"[nodes] {do} {number}: {error}", file=sys.stderr)
            case []:
                pass
            case [do, number] if do in known and number.isdigit():
                print(f"[nodes] there is no node {number}: they are 0 to {self.count - 1}", file=sys.stderr)
            case _:
                print(f"[nodes] {line.strip()!r}: try {_COMMANDS} with a number, or quit", file=sys.stderr)


def _read_lines(lines: Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
