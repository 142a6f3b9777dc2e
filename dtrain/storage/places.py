"""`storage_at`: from the place of a run folder, as people write it, to the storage that stands for it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from dtrain.errors import ConfigError
from dtrain.storage.aws import checked, split
from dtrain.storage.base import Storage
from dtrain.storage.filesystem import FilesystemStorage, for_s3fs
from dtrain.storage.local import LocalStorage
from dtrain.storage.s3 import S3Storage

S3_CLIENTS = ("obstore", "s3fs")


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL."""
    return "://" in os.fspath(place)


def on_disk(place: str | os.PathLike[str]) -> str:
    """A place as it was given, but the path of a URL such as `file:///data/run`: fsspec makes nothing durable there.

    :raises ConfigError: it has no path from the root on.
    """
    place = os.fspath(place)
    if not place.startswith("file:/"):
        return place
    if not (found := re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", place)):
        raise ConfigError(f"dir={place!r} must be like file:///data/run")
    return unquote(found[1])


def storage_at(
    place: str | os.PathLike[str], options: Mapping[str, Any] | None = None, *, unsafe_commit: bool = False
) -> Storage:
    """Nothing is opened yet.

    :param place: a folder, `file:///folder`, `s3://bucket/prefix`, or a URL of another file system that fsspec knows.
    :param options: see `Config.storage_options`.
    :param unsafe_commit: see `Config.unsafe_commit`.
    :raises ConfigError: the place or an option can't be right.
    """
    place = on_disk(place)
    given = dict(options or {})
    if re.match(r"[a-z0-9]+:/[^/]", place):
        raise ConfigError(f"dir={place!r} has one slash where a URL has two: {place.replace(':/', '://', 1)!r}")
    if not is_remote(place):
        return LocalStorage(place)
    if not place.startswith("s3://"):
        return FilesystemStorage(place, lambda: given, unsafe_commit=unsafe_commit)
    client = given.get("client", S3_CLIENTS[0])
    if client not in S3_CLIENTS:
        raise ConfigError(f"storage_options['client']={client!r} must be one of {', '.join(S3_CLIENTS)}")
    if client == "s3fs":
        split(place)
        given = checked(given)
        return FilesystemStorage(place, lambda: for_s3fs(given), unsafe_commit=unsafe_commit)
    return S3Storage(place, given, unsafe_commit=unsafe_commit)
