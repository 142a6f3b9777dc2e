"""A run folder on any other file system that fsspec knows: gs, abfs, memory, and S3 through s3fs for who wants that.

What it needs of one is that `pipe_file(..., mode="create")` doesn't overwrite; `prepare` finds out. No listing is ever
taken from a cache: another process may have committed since.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dtrain.errors import ConfigError
from dtrain.storage.base import File, HalfMade, Sink, inside
from dtrain.storage.objects import ObjectStorage

_PART_BYTES = 16 << 20
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""What the file systems call the time of the last change."""


class FilesystemStorage(ObjectStorage):
    """See `Storage`.

    :param root: a URL that fsspec understands.
    :param options: called for what the file system's own constructor is given, when it is opened.
    """

    def __init__(self, root: str, options: Callable[[], Mapping[str, Any]], *, unsafe_commit: bool = False) -> None:
        super().__init__(root, unsafe_commit=unsafe_commit)
        self._options = options
        self._opened: Any = None

    def read(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(self._fs().cat_file(self._name(path)))

    def files(self, folder: str) -> dict[str, File]:
        return {
            found["name"].rpartition("/")[2]: File(found["size"], _changed(found))
            for found in self._list(folder)
            if found["type"] == "file"
        }

    def names(self, folder: str, after: str = "") -> list[str]:
        names = (found["name"].rstrip("/").rpartition("/")[2] for found in self._list(folder))
        return sorted(name for name in names if name > after and not name.startswith("."))

    @contextlib.contextmanager
    def open_new(self, path: str, size: int = 0) -> Iterator[Sink]:
        with self._errors(path):
            file = self._fs().open(self._name(path), "wb", block_size=_PART_BYTES)
        try:
            yield file
        except BaseException:
            # To close it, as leaving a `with` would, publishes what there is of it.
            with contextlib.suppress(Exception):
                file.discard()
            file.closed = True
            raise
        with self._errors(path):
            written = file.tell()
            file.close()
            found = self._fs().size(self._name(path))
        if found != written:
            raise OSError(f"{self.place(path)} has {found} bytes after an upload of {written}")

    def remove(self, folder: str) -> None:
        with contextlib.suppress(OSError), self._errors(folder):
            self._fs().rm(self._name(folder), recursive=True)

    def half_made(self) -> Iterator[HalfMade]:
        return iter(())

    def _put_new(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._fs().pipe_file(self._name(path), data, mode="create")

    def _put(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._fs().pipe_file(self._name(path), data)

    def _delete(self, path: str) -> None:
        with self._errors(path):
            self._fs().rm_file(self._name(path))

    def _read_range(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        length = sum(view.nbytes for view in views)
        with self._errors(path):
            data = memoryview(self._fs().cat_file(self._name(path), start=offset, end=offset + length))
        if data.nbytes != length:
            raise OSError(f"{self.place(path)}: {data.nbytes} bytes came of {length}")
        for view in views:
            view[:] = data[: view.nbytes]
            data = data[view.nbytes :]

    def _size(self, path: str) -> int:
        with self._errors(path):
            return int(self._fs().size(self._name(path)))

    def _list(self, folder: str) -> list[dict[str, Any]]:
        fs = self._fs()
        fs.invalidate_cache()
        with self._errors(folder):
            try:
                found: list[dict[str, Any]] = fs.ls(self._name(folder), detail=True)
            except FileNotFoundError:
                return []
            return [entry for entry in found if entry["name"].strip("/") != self._name(folder).strip("/")]

    def _name(self, path: str) -> str:
        inner = str(inside(path, self.root))
        whole = self.root if inner == "." else f"{self.root}/{inner}"
        return str(self._fs()._strip_protocol(whole))

    def _fs(self) -> Any:
        """The file system, opened in this process; most have threads, which don't survive a fork."""
        with self._opening:
            if self._opened is None:
                import fsspec

                options = {"skip_instance_cache": True, "use_listings_cache": False, **self._options()}
                try:
                    self._opened = fsspec.filesystem(self.root.partition("://")[0], **options)
                except (ImportError, ValueError) as error:
                    raise ConfigError(f"dir={self.root!r}: {error}") from error
            return self._opened

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Whatever a file system raises, as an `OSError`. :raises ValueError: the path leads out."""
        inside(path, self.root)
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.place(path)) from error
        except (OSError, ConfigError):
            raise
        except Exception as error:
            raise OSError(f"{self.place(path)}: {type(error).__name__}: {error}") from error


def for_s3fs(options: Mapping[str, Any]) -> dict[str, Any]:
    """What stands for dtrain's own options with s3fs."""
    from dtrain.storage.aws import addressed

    where = addressed(options)
    style = {"s3": {"addressing_style": "path" if where["path_style"] else "auto"}}
    retries = {"retries": {"max_attempts": 8, "mode": "standard"}}
    chosen: dict[str, Any] = {"config_kwargs": style | retries, "client_kwargs": {"region_name": where["region"]}}
    more = {"endpoint_url": where["endpoint_url"], "profile": options.get("profile")}
    return chosen | {name: value for name, value in more.items() if value}


def _changed(found: Mapping[str, Any]) -> float:
    """When a file was last changed; now, if nobody knows."""
    value = next((found[name] for name in _CHANGED if found.get(name) is not None), None)
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value) if value is not None else time.time()
