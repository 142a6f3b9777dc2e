"""A run folder in an S3 bucket, through obstore (the Rust crate `object_store`).

That client beside s3fs, and why it is the default: see docs/s3.md. It does not touch Python while it waits or sends, so
the saver's threads hash meanwhile; it sends every part of an upload with its SHA-256, tries again by itself what is
worth it, with longer and longer pauses of random length, and gives an upload up that has failed.

Nothing is opened or imported before it is used: the supervisor forks, and the client has threads.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from dtrain.errors import ConfigError, UsageError
from dtrain.storage.aws import addressed, boto_errors, checked, credentials, split
from dtrain.storage.base import Buffer, File, HalfMade, Sink, inside
from dtrain.storage.objects import SILENT_S, ObjectStorage
from dtrain.storage.ranges import Ranges
from dtrain.storage.upload import Upload

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")

_PART_BYTES = 16 << 20
_MOST_PARTS = 9_000
"""S3 takes 10,000 of one object."""
_PARTS_AT_ONCE = 8
_PIECE_BYTES = 1 << 20
_REQUESTS = 3
"""As long as that many requests may take, one is tried again: it gets a third of the time."""
_CONNECT_S = 5.0
_RANGE_S = 20.0
"""What is read in one go is small enough for that, or the client is to see to it."""
_SIGNED = timedelta(hours=1)
_MOST_TRIES = 10_000
"""The time decides, not the number: a server that is away for a minute costs no save."""
_LOOKS = 4
_MOST_PAUSE_S = 5.0
_PORTS = {"http": 80, "https": 443}

_started_in = 0
"""The process that has used the client: its children can't."""


class S3Storage(ObjectStorage):
    """See `Storage`.

    :param root: `s3://bucket/prefix`.
    :param options: see `aws.OPTIONS`; what is left out is taken from the environment and the profile.
    """

    def __init__(self, root: str, options: Mapping[str, Any], *, unsafe_commit: bool = False) -> None:
        super().__init__(root, unsafe_commit=unsafe_commit)
        if importlib.util.find_spec("obstore") is None:
            raise ConfigError(f"{self.root} needs obstore: pip install 'dtrain[s3]'")
        self._options = checked(options)
        self._bucket, self._prefix = split(root)
        self.patience_s = float(self._options.get("timeout_s", self.patience_s))
        self._opened: S3Store | None = None
        self._ranges = Ranges(self._sign, min(self.patience_s / _REQUESTS, _RANGE_S))

    def read(self, path: str) -> bytes:
        import obstore

        return self._look(path, lambda store, name: bytes(obstore.get(store, name).bytes()))

    def files(self, folder: str) -> dict[str, File]:
        return {
            name: File(found["size"], found["last_modified"].timestamp())
            for found in self._list(folder)["objects"]
            # What is empty stands for a folder, with some servers; dtrain has no empty files.
            if (name := found["path"].rpartition("/")[2]) and found["size"]
        }

    def names(self, folder: str, after: str = "") -> list[str]:
        import obstore

        def behind(store: S3Store, name: str) -> list[str]:
            return [item["path"] for chunk in obstore.list(store, name, offset=f"{name}/{after}") for item in chunk]

        if after:  # of a folder without folders in it: the server begins at the right place
            with self.silence_told():
                paths = self._look(folder, behind)
        else:
            listed = self._list(folder)
            paths = [*listed["common_prefixes"], *(item["path"] for item in listed["objects"])]
        found = (path.rpartition("/")[2] for path in paths)
        return sorted(name for name in found if name and not name.startswith("."))

    @contextlib.contextmanager
    def open_new(self, path: str, size: int = 0) -> Iterator[Sink]:
        import obstore

        store, name = self._store(), self._name(path)
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))

        def upload(parts: Iterator[Buffer]) -> None:
            with self._errors(path):
                obstore.put(
                    store, name, parts, use_multipart=True, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE
                )

        with ThreadPoolExecutor(1) as pool:
            sink = Upload(part_bytes, lambda parts: pool.submit(upload, parts))
            try:
                yield sink
            except BaseException as error:
                sink.give_up(error)
                raise
            if not sink.finish():
                self._put(path, b"".join(sink.kept))
        found = self._size(path)
        if found != sink.written:
            raise OSError(f"{self.place(path)} has {found} bytes after an upload of {sink.written}")

    def remove(self, folder: str) -> None:
        import obstore

        with contextlib.suppress(OSError), self._errors(folder):
            for chunk in obstore.list(self._store(), self._name(folder)):
                obstore.delete(self._store(), [item["path"] for item in chunk])

    def half_made(self) -> Iterator[HalfMade]:
        """Uploads that were never finished."""
        client, prefix = self._boto(), f"{self._prefix}/" if self._prefix else ""
        with boto_errors(self.root):
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix):
                for upload in page.get("Uploads", ()):
                    place = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    pages = client.get_paginator("list_parts").paginate(**place)
                    try:
                        parts = [part for found in pages for part in found.get("Parts", ())]
                    except client.exceptions.NoSuchUpload:  # it is finished now
                        continue
                    changed = max([upload["Initiated"], *(part["LastModified"] for part in parts)])

                    def remove(place: dict[str, str] = place) -> None:
                        with boto_errors(self.root), contextlib.suppress(client.exceptions.NoSuchUpload):
                            client.abort_multipart_upload(**place)

                    name = upload["Key"].removeprefix(prefix)
                    yield HalfMade(name, sum(part["Size"] for part in parts), changed.timestamp(), remove)

    def _put_new(self, path: str, data: bytes) -> None:
        import obstore

        with self.silence_told(), self._errors(path):
            obstore.put(self._store(), self._name(path), data, mode="create", use_multipart=False)

    def _put(self, path: str, data: bytes) -> None:
        import obstore

        with self._errors(path):
            obstore.put(self._store(), self._name(path), data, use_multipart=False)

    def _delete(self, path: str) -> None:
        import obstore

        with self._errors(path):
            obstore.delete(self._store(), self._name(path))

    def _read_range(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        import obstore

        length = sum(view.nbytes for view in views)
        if self._ranges.read(self._name(path), offset, views):
            return

        def act(store: S3Store, name: str) -> None:
            left = list(views)
            # As it comes in: to have the client put it together first would take memory, and a copy more.
            for part in obstore.get(store, name, options={"range": (offset, offset + length)}).stream(_PIECE_BYTES):
                data = memoryview(part)
                while data.nbytes:
                    taken = min(data.nbytes, left[0].nbytes)
                    left[0][:taken] = data[:taken]
                    left[0], data = left[0][taken:], data[taken:]
                    if not left[0].nbytes:
                        left.pop(0)
            if left:
                raise OSError(f"{self.place(path)}: the answer has ended early")

        self._look(path, act)

    def _list(self, folder: str) -> Any:
        import obstore

        with self.silence_told():
            return self._look(folder, lambda store, name: obstore.list_with_delimiter(store, name or None))

    def _silence(self, until: float) -> str:
        where = addressed(self._options)
        server = where["endpoint_url"] or f"https://s3.{where['region']}.amazonaws.com"
        parts = urlsplit(server)
        why = ""
        if not getproxies():
            try:
                socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), _CONNECT_S).close()
            except OSError as error:
                why = f" ({error.strerror or error})"
        return (
            f"{self.root}: no answer from {server} for {SILENT_S:.0f} s{why}; it is being tried again until "
            f"{time.strftime('%H:%M:%S', time.localtime(until))}"
        )

    def _size(self, path: str) -> int:
        import obstore

        return self._look(path, lambda store, name: obstore.head(store, name)["size"])

    def _look(self, path: str, act: Callable[[S3Store, str], T]) -> T:
        """Ask for what changes nothing, and again after an answer that makes no sense, such as half of a listing: what
        the client sees of them it tries again only where it knows the reason."""
        store, name = self._store(), self._name(path)
        deadline = time.monotonic() + self.patience_s
        tried = 0
        while True:
            try:
                with self._errors(path):
                    return act(store, name)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                tried += 1
                if tried == _LOOKS or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, 0.1 * 2**tried))

    def _sign(self, name: str) -> str:
        """A URL that gives an object to whoever has it, for a while."""
        import obstore

        with self._errors(name):
            url: str = obstore.sign(self._store(), "GET", name, _SIGNED)
            return url

    def _name(self, path: str) -> str:
        name = str(inside(path, self.root))
        return "" if name == "." else name

    def _store(self) -> S3Store:
        """The client, opened in this process."""
        if _started_in not in (0, os.getpid()):
            raise UsageError(
                f"{self.root}: this process was forked from one that has used S3, and its client doesn't survive that; "
                "use it only after the fork"
            )
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> S3Store:
        global _started_in
        from obstore.store import S3Store

        _started_in = os.getpid()
        where = addressed(self._options)
        patience = timedelta(seconds=self.patience_s)
        return S3Store(
            self._bucket,
            prefix=self._prefix or None,
            **credentials(self._options),
            **({"endpoint": where["endpoint_url"]} if where["endpoint_url"] else {}),
            region=where["region"],
            virtual_hosted_style_request=not where["path_style"],
            checksum_algorithm="SHA256",
            client_options={
                "allow_http": str(where["endpoint_url"]).startswith("http://"),
                "timeout": patience / _REQUESTS,
                "connect_timeout": min(patience, timedelta(seconds=_CONNECT_S)),
            },
            retry_config={
                "max_retries": _MOST_TRIES,
                "retry_timeout": patience,
                "backoff": {"max_backoff": timedelta(seconds=_MOST_PAUSE_S)},
            },
        )

    def _boto(self) -> Any:
        """The client for the one thing that obstore can't do: to find uploads that were never finished."""
        import boto3
        from botocore.config import Config

        where = addressed(self._options)
        config = Config(
            s3={"addressing_style": "path" if where["path_style"] else "auto"},
            connect_timeout=min(self.patience_s, _CONNECT_S),
            read_timeout=self.patience_s / _REQUESTS,
            retries={"total_max_attempts": _LOOKS, "mode": "standard"},
        )
        session = boto3.Session(profile_name=self._options.get("profile"))
        return session.client("s3", endpoint_url=where["endpoint_url"], region_name=where["region"], config=config)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """The client's errors, as Python's own, without what is of use only to the client's makers."""
        from obstore import exceptions

        place = self.place(path)
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, _reason(error), place) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), place) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise PermissionError(errno.EACCES, _reason(error), place) from None
        except exceptions.BaseError as error:
            raise OSError(f"{place}: {_reason(error)}") from None
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # Rust's way to say that it has a fault
                raise OSError(f"{place}: {error}") from None
            raise


def _reason(error: BaseException) -> str:
    """The first line of a message, and the server's own words if it gave any."""
    text = str(error)
    silent = re.search(r"performing \w+ (\w+://[^/\s]+)\S* in ([\d.]+)s.* - HTTP error: (.*)", text)
    if silent:
        return f"no answer from {silent[1]} in {float(silent[2]):.0f} s ({silent[3]})"
    said = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL)
    if said:
        return f"{said[1]}: {said[2]}" if said[2] else said[1]
    return text.split("\n")[0]
