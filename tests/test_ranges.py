"""Ranges read from the socket into memory: all of it or nothing that is believed, and never a wait without an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dtrain.storage.places import storage_at
from dtrain.storage.ranges import Ranges
from tests.s3_server import BUCKET, Server

DATA = bytes(range(256)) * 64


class Answers(BaseHTTPRequestHandler):
    """To a range of `/good`, what was asked for; to the others, something else."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def do_GET(self) -> None:
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part, kind = DATA[begin : end + 1], self.path.partition("?")[0].strip("/")
        self.send_response(200 if kind == "all" else 404 if kind == "none" else 206)
        if "closes" in self.path:
            self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(part) - (kind == "short")))
        self.end_headers()
        if kind == "trickle":
            for byte in part:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif kind == "cut":
            self.wfile.write(part[:10])
            self.close_connection = True
        else:
            self.wfile.write(part[: len(part) - (kind == "short")])

    def handle(self) -> None:
        with suppress(ConnectionError):  # the reader has had enough
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["keeps", "closes"])
def ranges(request: pytest.FixtureRequest) -> Iterator[Ranges]:
    Answers.connections = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Ranges(lambda name: f"http://127.0.0.1:{server.server_port}/{name}?{request.param}", 0.5)
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_was_asked_for_lies_where_it_was_to_lie(ranges: Ranges) -> None:
    memory = memoryview(bytearray(1000))
    for offset in (0, 77, 5000):
        assert ranges.read("good", offset, [memory[500:], memory[:500]])
        assert bytes(memory[500:]) + bytes(memory[:500]) == DATA[offset : offset + 1000]
    assert Answers.connections == 3


@pytest.mark.parametrize("kind", ["all", "none", "short", "cut", "trickle"])
def test_another_answer_is_not_taken_and_does_not_stand_in_the_way_of_the_next(ranges: Ranges, kind: str) -> None:
    memory = memoryview(bytearray(1000))
    begun = time.monotonic()
    assert not ranges.read(kind, 0, [memory])
    assert time.monotonic() - begun < 3
    assert ranges.read("good", 10, [memory])
    assert bytes(memory) == DATA[10:1010]


def test_a_server_that_never_takes_them_is_not_asked_for_ever(ranges: Ranges) -> None:
    for _ in range(30):
        assert not ranges.read("none", 0, [memoryview(bytearray(1000))])
    assert Answers.connections == 20


def test_behind_a_proxy_and_over_tls_the_client_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [memoryview(bytearray(10))]
    assert not Ranges(lambda name: "https://127.0.0.1:1/x?signed", 1.0).read("x", 0, memory)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    def never(name: str) -> str:
        raise AssertionError

    assert not Ranges(never, 1.0).read("x", 0, memory)


@pytest.mark.own_process
def test_a_real_server_takes_the_signed_url_and_says_what_is_not_there(s3: Server) -> None:
    storage = storage_at(f"s3://{BUCKET}/ranges")
    with storage.open_new("folder/file") as sink:
        sink.write(DATA)
    memory = memoryview(bytearray(300))
    storage.read_into("folder/file", 100, [memory[:100], memory[100:]])
    assert bytes(memory) == DATA[100:400]
    assert storage._ranges._failures == 0  # type: ignore[attr-defined]
    with pytest.raises(FileNotFoundError):
        storage.read_into("folder/none", 0, [memory])
    with pytest.raises(EOFError):
        storage.read_into("folder/file", len(DATA) - 10, [memory])
