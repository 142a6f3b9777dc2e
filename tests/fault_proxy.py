"""`Proxy`: stands between a client and an S3 server, and does to one of the requests what networks and servers do.

    with Proxy(server.url) as proxy:
        proxy.arm("lost reply", 3)      the third request from now on is carried out, and its answer is thrown away
        ...                             client of proxy.url
        proxy.disarm()                  :returns: what was asked since, and whether the fault has come to pass

Requests are numbered in the order in which they arrive. They are passed on as they are, so that their signatures hold:
of the host too, which is the proxy's.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal[
    "503",
    "500",
    "429",
    "409",
    "412",
    "no answer",
    "reset",
    "lost reply",
    "truncated",
    "slow",
    "flipped request",
    "flipped reply",
    "gone",
    "held",
]
"""429, 5xx, 409 and 412 are answered without asking the server; a reset comes before the request has reached it. A flip
is of one bit in the body; `gone` is a reset of this and of every request after it; `held` waits for `release`."""

FAULTS: tuple[Fault, ...] = tuple(fault for fault in get_args(Fault) if fault != "held")
_CODES = {
    "503": ("Service Unavailable", "SlowDown"),
    "500": ("Internal Server Error", "InternalError"),
    "429": ("Too Many Requests", "TooManyRequests"),
    "409": ("Conflict", "ConditionalRequestConflict"),
    "412": ("Precondition Failed", "PreconditionFailed"),
}
_SILENCE_S = 30.0
"""Longer than any client here waits."""


class Proxy:
    """See above. :ivar url: what a client is given."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._at = 0
        self._asked: list[str] = []
        self._done = False
        self._ending = ""
        self._chance: tuple[random.Random, float] | None = None
        self._closing = threading.Event()
        self._released = threading.Event()
        self.held = threading.Event()
        """Set when a request is held."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy._handle(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # the client has gone away, as it does in many of these cases

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def arm(self, fault: Fault | None = None, at: int = 0) -> None:
        """Count requests anew, and do this to the one of that number, counted from 1."""
        with self._lock:
            self._fault, self._at, self._asked, self._done = fault, at, [], False
            self.held.clear()
            self._released.clear()

    def arm_by_chance(self, dice: random.Random, share: float) -> None:
        """From now on, do something to such a share of the requests."""
        self.arm()
        with self._lock:
            self._chance = dice, share

    def hold_next(self, ending: str) -> None:
        """Hold the next PUT to a path that ends so."""
        self.arm()
        with self._lock:
            self._ending = ending

    def release(self) -> None:
        """Let the request that is held go on to the server."""
        self._released.set()

    def disarm(self) -> tuple[list[str], bool]:
        """:returns: method and path of each request since `arm`, and whether the fault has come to pass."""
        with self._lock:
            self._fault = self._chance = None
            self._ending = ""
            return self._asked, self._done

    def _handle(self, client: BaseHTTPRequestHandler) -> None:
        body = client.rfile.read(int(client.headers.get("Content-Length") or 0))
        with self._lock:
            self._asked.append(f"{client.command} {urlsplit(client.path).path}")
            number = len(self._asked)
            fault = self._fault if number == self._at or (self._fault == "gone" and number > self._at > 0) else None
            if self._chance is not None and self._chance[0].random() < self._chance[1]:
                fault = self._chance[0].choice([kind for kind in FAULTS if kind != "gone"])
            if self._ending and client.command == "PUT" and urlsplit(client.path).path.endswith(self._ending):
                fault, self._ending = "held", ""
            self._done = self._done or fault is not None
        if fault in _CODES:
            self._refuse(client, fault)
            return
        if fault in ("reset", "gone"):
            _reset(client)
            return
        if fault == "no answer":
            self._closing.wait(_SILENCE_S)
            _reset(client)
            return
        if fault == "held":
            self.held.set()
            self._released.wait(_SILENCE_S)
        if fault == "flipped request" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        try:
            answer, data = self._ask(client, body)
        except OSError:  # the server is away
            _reset(client)
            return
        if fault == "lost reply":
            _reset(client)
            return
        if fault == "flipped reply" and data and answer.status < 300:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        client.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                client.send_header(name, value)
        length = answer.headers.get("Content-Length") if client.command == "HEAD" else str(len(data))
        client.send_header("Content-Length", length or "0")
        client.end_headers()
        if fault == "truncated":
            client.wfile.write(data[: len(data) // 2])
            _reset(client)
        elif fault == "slow":
            for at in range(0, len(data), 64):
                if self._closing.wait(0.1):
                    break
                client.wfile.write(data[at : at + 64])
        elif client.command != "HEAD":
            client.wfile.write(data)

    def _ask(self, client: BaseHTTPRequestHandler, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        assert self._upstream.hostname is not None
        connection = http.client.HTTPConnection(self._upstream.hostname, self._upstream.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
            for name, value in client.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer, answer.read()

    def _refuse(self, client: BaseHTTPRequestHandler, code: str) -> None:
        reason, name = _CODES[code]
        text = f'<?xml version="1.0"?><Error><Code>{name}</Code><Message>{reason}, for a test.</Message></Error>'
        client.send_response_only(int(code), reason)
        client.send_header("Content-Type", "application/xml")
        client.send_header("Content-Length", str(0 if client.command == "HEAD" else len(text)))
        client.end_headers()
        if client.command != "HEAD":
            client.wfile.write(text.encode())


def _reset(client: BaseHTTPRequestHandler) -> None:
    """End the connection with a RST."""
    client.close_connection = True
    with contextlib.suppress(OSError):
        client.wfile.flush()
        time.sleep(0.005)  # what was sent before is to arrive
        client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connection.close()
