"""S3 servers that run as processes on this machine, each with a folder, ports and credentials of its own.

with seaweed(folder) as server:             a real one that keeps what it has acknowledged
    server.kill(); server.start()           as when its machine loses its power
with rclone(folder) as server: ...          one that ignores If-None-Match
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dtrain.elastic.process import die_with
from dtrain.errors import ConfigError

BUCKET = "bucket"
_PATIENCE_S = 60.0
KEY, SECRET = "local", "of-no-use-elsewhere"


class Server:
    """One server, with a folder, ports and credentials of its own. What it holds stays, so it can be started again."""

    def __init__(self, command: list[str], folder: Path, url: str, settings: dict[str, str]) -> None:
        """:param settings: for its environment."""
        self._command = command
        self._folder = folder
        self.url = url
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A client of boto3."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=20),
        )

    def start(self) -> None:
        """Returns when what is written can be read."""
        parent = os.getpid()
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=os.environ | self.settings,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        deadline = time.monotonic() + _PATIENCE_S
        client = self.client()
        while True:
            try:
                if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=BUCKET)
                name = f"ready-{uuid.uuid4().hex}"
                client.put_object(Bucket=BUCKET, Key=name, Body=b"ready")
                assert client.get_object(Bucket=BUCKET, Key=name)["Body"].read() == b"ready"
                client.delete_object(Bucket=BUCKET, Key=name)
                return
            except (BotoCoreError, ClientError):
                assert self._process.poll() is None, (self._folder / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline, (self._folder / "server.log").read_text()[-3000:]
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, at any moment."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def seaweed(folder: Path, *, memory: str = "512MiB") -> Iterator[Server]:
    """All of SeaweedFS in one process.

    :param memory: what it tries to make do with.
    :raises ConfigError: it isn't installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "local",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "admin.ui": "false",
        "webdav": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": folder / "s3.json",
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        **ports,
    }
    command = [beside_python("weed"), "-logtostderr", "mini", *(f"-{name}={value}" for name, value in options.items())]
    yield from served(Server(command, folder, f"http://127.0.0.1:{ports['s3.port']}", {"GOMEMLIMIT": memory}))


def served(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def beside_python(name: str) -> str:
    """A program that was installed with this Python. :raises ConfigError: it wasn't."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{name} isn't installed beside {sys.executable}: pip install 'dtrain[demo]' brings it")
    return str(path)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
