"""`Ranges`: parts of objects, read from the socket right into the memory that they are for.

A client that puts an answer together first costs a copy or two of it; on a machine whose processors are busy that is a
fifth of the time of a download (benchmarks/s3.py). So a range is asked for here first, by a signed URL over an HTTP
connection of its own. What goes wrong is not judged here: then the client is asked, which tries again and names the
reason. Only without TLS, which Python's own module unpacks by 16 KiB at a time.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit
from urllib.request import getproxies

_SIGNED_S = 300.0
"""How long a URL is used. Credentials that are about to end would take it with them."""
_MOST_FAILURES = 20
"""A server that doesn't take such requests isn't asked for ever."""


class Ranges:
    """Of one bucket's objects.

    :param sign: makes the URL of an object, with which nothing else is needed to read it.
    :param patience_s: how long a read may take, in seconds.
    """

    def __init__(self, sign: Callable[[str], str], patience_s: float) -> None:
        self._sign = sign
        self._patience_s = patience_s
        self._urls: dict[str, tuple[float, str]] = {}
        self._failures = _MOST_FAILURES if getproxies() else 0

    def read(self, name: str, offset: int, views: Sequence[memoryview]) -> bool:
        """Fill memory from `offset` on. :returns: whether that was done."""
        if self._failures >= _MOST_FAILURES:
            return False
        try:
            done = self._read(name, offset, views)
        except (OSError, http.client.HTTPException):
            done = False
        if not done:
            self._failures += 1
        return done

    def _read(self, name: str, offset: int, views: Sequence[memoryview]) -> bool:
        url = urlsplit(self._url(name))
        if url.scheme != "http":
            self._failures = _MOST_FAILURES
            return False
        length = sum(view.nbytes for view in views)
        with ExitStack() as stack:
            connection = http.client.HTTPConnection(url.netloc, timeout=self._patience_s)
            stack.callback(connection.close)
            connection.connect()
            # What trickles in is ended: the client then has its own way to wait.
            timer = threading.Timer(self._patience_s, _shut, [connection.sock])
            timer.daemon = True
            stack.callback(timer.cancel)
            timer.start()
            headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Connection": "close"}
            connection.request("GET", f"{url.path}?{url.query}", headers=headers)
            answer = stack.enter_context(connection.getresponse())
            if answer.status != http.client.PARTIAL_CONTENT or answer.length != length:
                return False
            for view in views:
                left = view
                while left.nbytes:
                    got = answer.readinto(left)
                    if not got:
                        return False
                    left = left[got:]
            return True

    def _url(self, name: str) -> str:
        until, url = self._urls.get(name, (0.0, ""))
        if time.monotonic() > until:
            url = self._sign(name)
            self._urls[name] = time.monotonic() + _SIGNED_S, url
        return url


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)
