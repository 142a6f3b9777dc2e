"""S3 servers for the tests: a real one, and one that ignores If-None-Match."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dtrain.cli.s3_server import BUCKET, KEY, SECRET, Server, beside_python, free_ports, seaweed, served

__all__ = ["BUCKET", "Server", "rclone", "seaweed"]


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """rclone's server for a folder, which overwrites what it was asked to create."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    command = [beside_python("rclone"), "serve", "s3", str(data), f"--addr=127.0.0.1:{port}"]
    command += [f"--auth-key={KEY},{SECRET}"]
    yield from served(Server(command, folder, f"http://127.0.0.1:{port}", {"RCLONE_CONFIG": os.devnull}))
