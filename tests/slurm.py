"""SLURM on one machine, from the packages slurmctld, slurmd and slurm-client of Debian: started and ended by a test."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.jobs import ROOT, Hang

PATIENCE_S = 300.0
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=2,preempt_youngest_first
KillWait=15
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=30
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF MaxTime=30
"""


def is_there() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "sbatch")))


class Slurm:
    """One that runs. Use `slurm`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def submit(self, *command: str, **environment: str) -> int:
        """:returns: the job's number."""
        found = subprocess.run(
            ["sbatch", "--parsable", *command],
            env=self.environment | environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return int(found.stdout)

    def state(self, job: int) -> str:
        found = re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", str(job)))
        assert found is not None
        return found[1]

    def until(self, job: int, *states: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise Hang(f"job {job} is {state}, not {states}:\n{self.said()}")
            time.sleep(0.2)

    def until_said(self, text: str, name: str) -> None:
        """Wait for something in a job's output."""
        deadline = time.monotonic() + PATIENCE_S
        path = self.folder / f"{name}.out"
        while not (path.exists() and text in path.read_text(errors="replace")):
            if time.monotonic() > deadline:
                raise Hang(f"no {text!r}:\n{self.said()}")
            time.sleep(0.2)

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-100_000:] for path in sorted(self.folder.glob("*.out")))


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster of one node with two processors, and two partitions: jobs of `high` take the place of others."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(2)
    text = _CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    found = Slurm(folder)
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            with (folder / f"{name}.log").open("w") as log:
                daemons.append(
                    subprocess.Popen(
                        [name, "-D"], env=found.environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
        deadline = time.monotonic() + PATIENCE_S
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "--noheader", "--format=%t"], env=found.environment, capture_output=True, text=True
            ).stdout
        ):
            if time.monotonic() > deadline:
                raise Hang("\n".join(path.read_text()[-3000:] for path in folder.glob("*.log")))
            time.sleep(0.2)
        yield found
    finally:
        subprocess.run(["scancel", "--user=root"], env=found.environment, capture_output=True)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and found.ask("squeue", "--noheader").strip():
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
