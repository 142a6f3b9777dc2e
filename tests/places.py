"""Run folders, on a disk or in a bucket, as they are seen without dtrain."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config


class Place:
    """One run folder. On a bucket, the server is the one that the environment names."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self._kept: dict[str, bytes] = {}
        self._bucket, _, self._prefix = root.removeprefix("s3://").partition("/") if "://" in root else ("", "", "")

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder; nothing if there is none."""
        if not self._bucket:
            path = self._root / folder
            return sorted(inner.name for inner in path.iterdir()) if path.is_dir() else []
        prefix = "/".join(filter(None, [self._prefix, folder])) + "/"
        names = set()
        for page in self._client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            names |= {entry["Key"].removeprefix(prefix).partition("/")[0] for entry in page.get("Contents", ())}
        return sorted(names)

    def read(self, path: str) -> bytes:
        if not self._bucket:
            return (self._root / path).read_bytes()
        key = f"{self._prefix}/{path}"
        if key not in self._kept:  # what dtrain has written once it never changes
            self._kept[key] = bytes(self._client().get_object(Bucket=self._bucket, Key=key)["Body"].read())
        return self._kept[key]

    def _client(self) -> Any:
        return _client(os.environ["AWS_ENDPOINT_URL"])


@functools.cache
def _client(url: str) -> Any:
    return boto3.client("s3", endpoint_url=url, config=Config(s3={"addressing_style": "path"}))
