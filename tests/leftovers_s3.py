"""A writer that is stopped (SIGSTOP) at each request of its save, and continued when the next generation has committed:
nothing may change that a reader can see.

    python -m tests.leftovers_s3

The request that it was stopped at is carried out as late as that, too. A line for each request; exits with 1 if one
goes wrong. It starts a server of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from dtrain.elastic.process import Child, fork
from dtrain.errors import Fenced, SaveError
from tests.fault_proxy import Proxy
from tests.faults_s3 import Generation, alone, config_of, read_newest
from tests.places import Place
from tests.s3_server import BUCKET, seaweed

_MOST_REQUESTS = 40
_PATIENCE_S = 60.0


class Writer:
    """A process that was forked before anybody has used S3, and does what it is told."""

    def __init__(self) -> None:
        ours, self._told = os.pipe()
        self._said, theirs = os.pipe()

        def work() -> int:
            with os.fdopen(ours) as orders, os.fdopen(theirs, "w", buffering=1) as report, alone():
                order = json.loads(orders.readline() or "{}")
                if not order:
                    return 0
                os.environ.update(order["environment"])
                generation = Generation(config_of(order["root"], order["local"], order["url"]))
                for step in (1, 2):
                    generation.save(step)
                report.write("ready\n")
                orders.readline()
                try:
                    generation.save(3)
                    report.write("saved\n")
                except (Fenced, SaveError) as error:
                    report.write(f"{type(error).__name__}\n")
            return 0

        self.process: Child = fork(work)
        os.close(ours)
        os.close(theirs)
        self._from = os.fdopen(self._said)

    def tell(self, **order: object) -> None:
        os.write(self._told, json.dumps(order).encode() + b"\n")

    def says(self) -> str:
        return self._from.readline().strip()

    def end(self) -> None:
        os.close(self._told)
        self.process.kill()
        self._from.close()


def visible(root: str) -> dict[str, bytes]:
    """What a reader goes by: the log, and what lies in the checkpoints that it tells of."""
    place = Place(root)
    found = {f"log/{name}": place.read(f"log/{name}") for name in place.names("log")}
    entries = [json.loads(data)["entry"] for data in found.values()]
    gone = {entry["attempt"] for entry in entries if entry["kind"] in ("retire", "bad")}
    for entry in entries:
        if entry["kind"] == "commit" and entry["attempt"] not in gone:
            folder = f"checkpoints/{entry['attempt']}"
            found |= {f"{folder}/{name}": place.read(f"{folder}/{name}") for name in place.names(folder)}
    return found


def main() -> int:
    writers = [Writer() for _ in range(_MOST_REQUESTS)]
    wrong = done = 0
    with (
        TemporaryDirectory() as folder,
        seaweed(Path(folder) / "server") as server,
        Proxy(server.url) as proxy,
        alone(),
    ):
        os.environ.update(server.environment)
        for writer in writers:
            root, local = f"s3://{BUCKET}/{uuid.uuid4().hex}", str(Path(folder) / uuid.uuid4().hex)
            writer.tell(root=root, local=local, url=proxy.url, environment=server.environment)
            assert writer.says() == "ready"
            proxy.arm("held", done + 1)
            writer.tell()
            # Either it comes to that request, or it is at the end of its save without one of this number.
            if not proxy.held.wait(3.0):
                assert writer.says() == "saved"
                break
            os.kill(writer.process.pid, signal.SIGSTOP)
            request = proxy.disarm()[0][-1]
            config = config_of(root, local, server.url)
            generation = Generation(config)
            for step in (4, 5):
                generation.save(step)
            before = visible(root)
            os.kill(writer.process.pid, signal.SIGCONT)
            proxy.release()
            outcome = writer.says()
            after = visible(root)
            same = before == after and read_newest(config) == 5
            generation.save(6)
            same = same and read_newest(config) == 6
            done, wrong = done + 1, wrong + (not same)
            method, path = request.split()
            changed = "nothing changed" if same else f"CHANGED: {sorted(before.items() ^ after.items())}"
            print(
                f"{done:2} {method:6} .../{'/'.join(path.split('/')[3:]):60} it says {outcome:10} {changed}", flush=True
            )
    for writer in writers:
        writer.end()
    print(f"stopped at each of the {done} requests of a save; {wrong} went wrong")
    return int(bool(wrong) or done < 8)


if __name__ == "__main__":
    sys.exit(main())
