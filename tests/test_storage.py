"""What a run asks of the place where it is kept, of every kind of place: a disk, memory, and a real S3 server through
both clients."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint import DefaultSavePlanner

import dtrain
from dtrain.checkpoint import Reader, Writer
from dtrain.errors import ConfigError, NoGoodCheckpoint
from dtrain.storage.base import Storage
from dtrain.storage.filesystem import FilesystemStorage
from dtrain.storage.places import storage_at
from tests.fault_proxy import Fault, Proxy
from tests.s3_server import BUCKET, Server, rclone

pytestmark = pytest.mark.own_process

PLACES = ("disk", "memory", "obstore", "s3fs")


@pytest.fixture(params=PLACES)
def storage(request: pytest.FixtureRequest, tmp_path: Path, s3: Server) -> Storage:
    if request.param == "disk":
        return storage_at(tmp_path / "run")
    if request.param == "memory":
        return storage_at(f"memory://{uuid.uuid4().hex}/run")
    return storage_at(f"s3://{BUCKET}/{uuid.uuid4().hex}/run", {"client": request.param})


def written(storage: Storage, path: str, *parts: bytes) -> bytes:
    with storage.open_new(path) as sink:
        for part in parts:
            sink.write(memoryview(part))
    return b"".join(parts)


def test_a_place_is_prepared_and_nothing_stays_there(storage: Storage) -> None:
    storage.prepare()
    assert storage.names(".") == []
    assert storage.files(".") == {}
    assert list(storage.half_made()) == []


def test_a_name_is_created_once(storage: Storage) -> None:
    storage.create("log/00000000.json", b"first")
    with pytest.raises(FileExistsError):
        storage.create("log/00000000.json", b"second")
    assert storage.read("log/00000000.json") == b"first"


def test_what_is_written_is_read_in_any_part(storage: Storage) -> None:
    data = written(storage, "a/file", os.urandom(17 << 20), b"", os.urandom(33 << 20), b"end")
    for start, sizes in ((0, (len(data),)), (5, (1, 0, 40 << 20)), (len(data) - 3, (3,)), (17 << 20, (7, 7))):
        buffers = [bytearray(size) for size in sizes]
        storage.read_into("a/file", start, [memoryview(buffer) for buffer in buffers])
        assert b"".join(buffers) == data[start : start + sum(sizes)]
    assert storage.files("a")["file"].bytes == len(data)
    assert abs(storage.files("a")["file"].changed - time.time()) < 60


def test_a_read_beyond_the_end_is_an_error_of_its_own(storage: Storage) -> None:
    written(storage, "file", b"0123456789")
    for start, size in ((5, 6), (10, 1), (20, 5)):
        with pytest.raises(EOFError, match="file ends at byte"):
            storage.read_into("file", start, [memoryview(bytearray(size))])


def test_what_is_not_there_is_missing(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError) as found:
        storage.read("no/such")
    assert found.value.errno is not None
    with pytest.raises(FileNotFoundError):
        storage.read_into("no/such", 0, [memoryview(bytearray(1))])
    assert storage.names("no") == []
    assert storage.files("no") == {}
    storage.remove("no")


def test_names_are_those_right_in_a_folder(storage: Storage) -> None:
    for name in ("log/b", "log/a", "log/.hidden", "log/c", "checkpoints/x/1", "checkpoints/y/1", "config.json"):
        written(storage, name, name.encode())
    assert storage.names("log") == ["a", "b", "c"]
    assert storage.names("log", after="a") == ["b", "c"]
    assert storage.names("log", after="c") == []
    assert storage.names("checkpoints") == ["x", "y"]
    assert storage.names(".") == ["checkpoints", "config.json", "log"]
    assert set(storage.files("log")) == {"a", "b", "c", ".hidden"}
    assert set(storage.files(".")) == {"config.json"}


def test_a_folder_is_removed_and_its_neighbours_stay(storage: Storage) -> None:
    for name in ("checkpoints/x/1", "checkpoints/x/2/3", "checkpoints/xy/1"):
        written(storage, name, b"data")
    storage.remove("checkpoints/x")
    assert "xy" in storage.names("checkpoints")
    assert [storage.files(f"checkpoints/{name}").keys() for name in ("x", "x/2", "xy")] == [set(), set(), {"1"}]
    if not storage.root.startswith("s3:"):  # SeaweedFS goes on to list the folder
        assert storage.names("checkpoints") == ["xy"]


def test_another_process_sees_at_once_what_was_created(storage: Storage) -> None:
    """Nothing is taken from a listing that was made before."""
    if storage.root.startswith("memory"):  # which is a process's own
        return
    assert storage.names("log") == []
    options = {"client": "s3fs"} if isinstance(storage, FilesystemStorage) else {}
    script = "import sys; from dtrain.storage.places import storage_at\n"
    script += f"storage_at(sys.argv[1], {options if '://' in storage.root else None}).create('log/x', b'theirs')"
    subprocess.run([sys.executable, "-c", script, storage.root], check=True)
    assert storage.names("log") == ["x"]
    with pytest.raises(FileExistsError):
        storage.create("log/x", b"ours")


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b"])
def test_no_path_leads_out(storage: Storage, path: str) -> None:
    for act in (storage.read, storage.names, storage.files):
        with pytest.raises(ValueError, match="leads out of the run folder"):
            act(path)
    with pytest.raises(ValueError, match="leads out of the run folder"):
        storage.create(path, b"")
    with pytest.raises(ValueError, match="leads out of the run folder"), storage.open_new(path):
        pass


def test_an_upload_that_its_writer_gives_up_leaves_nothing(storage: Storage, s3: Server) -> None:
    if not storage.root.startswith("s3:"):  # elsewhere it stays, in an attempt that isn't committed
        return

    def give_up() -> None:
        with storage.open_new("a/file") as sink:
            sink.write(bytes(40 << 20))
            raise RuntimeError("the disk of another rank is full")

    with pytest.raises(RuntimeError, match="the disk of another rank is full"):
        give_up()
    assert storage.names("a") == []
    assert unfinished(s3, storage.root) == []


@pytest.mark.parametrize("fault", ["reset", "no answer", "lost reply", "503", "409", "412"])
def test_a_creation_is_tried_again_until_it_is_known_what_came_of_it(s3: Server, fault: Fault) -> None:
    with Proxy(s3.url) as proxy:
        storage = storage_at(f"s3://{BUCKET}/{uuid.uuid4().hex}", {"endpoint_url": proxy.url, "timeout_s": 3})
        proxy.arm(fault, 1)
        storage.create("log/0", b"ours")
        assert proxy.disarm()[1], "the fault has come to pass"
        assert storage.read("log/0") == b"ours"


def test_a_checkpoint_without_a_run_is_read_by_its_own_url(s3: Server) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    state = {"a": torch.arange(5.0)}
    writer = Writer(url, "step-7", state, step=7)
    dcp.save(writer.state_dict, storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    found = {"a": torch.zeros(5)}
    dcp.load(found, storage_reader=Reader.open(f"{url}/step-7"))
    assert torch.equal(found["a"], state["a"])
    with pytest.raises((ConfigError, NoGoodCheckpoint), match="is no run, no checkpoint and no safetensors"):
        Reader.open(f"{url}/step-8")


def test_an_upload_takes_no_second_copy(s3: Server) -> None:
    """It goes from the memory that it is given, part by part."""
    data = memoryview(bytearray(os.urandom(1 << 20) * 384))
    storage = storage_at(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    storage.create("warm", b"the client is there")
    before = peak_kib()
    with storage.open_new("file", data.nbytes) as sink:
        for start in range(0, data.nbytes, 32 << 20):
            sink.write(data[start : start + (32 << 20)])
    assert storage.files(".")["file"].bytes == data.nbytes
    assert peak_kib() - before < 192 << 10, "eight parts, and some"


def peak_kib() -> int:
    """The most memory that this process has had, in KiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def test_an_upload_in_many_small_parts_is_whole(storage: Storage) -> None:
    data = written(storage, "file", *(os.urandom(size) for size in range(1, 2000)))
    assert storage.read("file") == data


def unfinished(s3: Server, root: str) -> list[str]:
    """Uploads that the server still waits for."""
    found = s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    prefix = root.removeprefix(f"s3://{BUCKET}/")
    return [upload["Key"] for upload in found if upload["Key"].startswith(prefix)]


def test_a_killed_upload_is_found_and_can_be_given_up(s3: Server) -> None:
    root = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    begun = f"{root.removeprefix(f's3://{BUCKET}/')}/checkpoints/a/file"
    client = s3.client()
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=begun)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=begun, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
    (left,) = storage_at(root).half_made()
    assert (left.path, left.bytes) == ("checkpoints/a/file", 5 << 20)
    assert abs(left.changed - time.time()) < 60
    left.remove()
    assert unfinished(s3, root) == []


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_server_that_overwrites_what_was_to_be_created_is_refused(
    careless: Server, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    for name, value in careless.environment.items():
        monkeypatch.setenv(name, value)
    root = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    with pytest.raises(ConfigError, match=re.escape(f"dir='{root}': what is behind it has overwritten")) as found:
        storage_at(root, {"client": client}).prepare()
    assert "unsafe_commit=True" in str(found.value)
    assert storage_at(root).names(".") == []
    unsafe = storage_at(root, {"client": client}, unsafe_commit=True)
    unsafe.prepare()
    unsafe.create("log/0", b"first")
    with pytest.raises(FileExistsError):
        unsafe.create("log/0", b"second")


class Careless(MemoryFileSystem):  # type: ignore[misc]
    """As file systems are that know nothing of `mode`."""

    protocol = "careless"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


def test_a_file_system_that_can_not_create_exclusively_is_refused() -> None:
    fsspec.register_implementation("careless", Careless, clobber=True)
    with pytest.raises(ConfigError, match="dir='careless://x/run': what is behind it has overwritten a file"):
        storage_at("careless://x/run").prepare()


def test_a_file_system_that_nobody_knows_is_named() -> None:
    with pytest.raises(ConfigError, match="dir='ftpx://host/run': Protocol not known: ftpx"):
        storage_at("ftpx://host/run").prepare()


def test_a_server_that_does_not_answer_is_named_within_seconds_and_is_no_wrong_option(
    s3: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = storage_at(f"s3://{BUCKET}/x", {"endpoint_url": "http://127.0.0.1:9", "timeout_s": 6})
    begun = time.time()
    with pytest.raises(OSError, match=r"no answer from http://127.0.0.1:9 in \d+ s \(error sending request\)"):
        storage.prepare()
    assert time.time() - begun < 12, "it is tried for as long as was asked for"
    times = {time.strftime("%H:%M:%S", time.localtime(begun + 6 + late)) for late in range(8)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    line, _, until = said[0].rpartition(" ")
    assert line == (
        f"[dtrain] s3://{BUCKET}/x: no answer from http://127.0.0.1:9 for 4 s (Connection refused); it is being tried "
        "again until"
    )
    assert until in times
    storage_at(f"s3://{BUCKET}/x").prepare()
    assert capsys.readouterr().err == ""


def test_who_is_not_let_in_is_told_so(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-private")
    with pytest.raises(ConfigError, match="SignatureDoesNotMatch") as found:
        storage_at(f"s3://{BUCKET}/x").prepare()
    assert "wrong-and-private" not in str(found.value)


def test_without_credentials_it_says_where_they_are_looked_for(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match=r"no AWS credentials: set AWS_ACCESS_KEY_ID and .*--storage-option profile="):
        storage_at(f"s3://{BUCKET}/x").prepare()


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_profile_has_the_credentials(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    known = s3.environment
    lines = ["[mine]", f"aws_access_key_id={known['AWS_ACCESS_KEY_ID']}"]
    lines += [f"aws_secret_access_key={known['AWS_SECRET_ACCESS_KEY']}"]
    (tmp_path / "credentials").write_text("\n".join(lines))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    options = {"profile": "mine", "endpoint_url": s3.url, "client": client}
    storage = storage_at(f"s3://{BUCKET}/{uuid.uuid4().hex}", options)
    storage.prepare()
    storage.create("x", b"x")
    assert storage.read("x") == b"x"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3:/bucket/x", "dir='s3:/bucket/x' has one slash where a URL has two: 's3://bucket/x'"),
        ("s3://", "dir='s3://' must be like s3://bucket/prefix"),
        ("s3://bucket/../x", "dir='s3://bucket/../x' must be like s3://bucket/prefix"),
        ("s3://bucket//x", "dir='s3://bucket//x' must be like s3://bucket/prefix"),
        ("s3://me:mine@bucket/x", "an s3:// URL must not hold a user's name or password"),
    ],
)
def test_a_place_that_can_not_be_right_is_named(place: str, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        dtrain.Config(dir=place, global_batch=1, micro_batch=1)
    assert str(found.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aws_secret_access_key": "x"}, "storage_options['aws_secret_access_key']: credentials don't belong into"),
        ({"colour": "red"}, "storage_options['colour'] is unknown; there are: client, endpoint_url, region, profile"),
        ({"client": "curl"}, "storage_options['client']='curl' must be one of obstore, s3fs"),
        ({"timeout_s": "1m"}, "storage_options['timeout_s']='1m' must be a number of seconds above zero"),
        ({"endpoint_url": "http://me:mine@host"}, "the endpoint's URL must not hold a user's name or password"),
        ({"timeout_s": math.inf}, "storage_options['timeout_s']=inf must be a number of seconds above zero, at most"),
        ({"timeout_s": 1e300}, "storage_options['timeout_s']=1e+300 must be a number of seconds above zero, at most"),
        ({"path_style": "maybe"}, "storage_options['path_style']='maybe' must be true or false"),
        ({"endpoint_url": "http://[::1"}, "endpoint_url='http://[::1' must be like https://host or http://host:port"),
        ({"endpoint_url": "http://me:mine@[::1"}, "the endpoint's URL must not hold a user's name or password"),
        ({"endpoint_url": "http://host:no"}, "endpoint_url='http://host:no' must be like https://host or http://host"),
        ({"endpoint_url": "localhost:9000"}, "endpoint_url='localhost:9000' must be like https://host or http://host"),
    ],
)
def test_an_option_that_can_not_be_right_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        dtrain.Config(dir="s3://bucket/run", global_batch=1, micro_batch=1, storage_options=options)
    assert str(found.value).startswith(message)


def test_nothing_is_imported_or_started_before_it_is_used() -> None:
    """What has threads doesn't survive the supervisor's fork."""
    script = "import os, sys, dtrain\n"
    script += "c = dtrain.Config(dir='s3://bucket/run', global_batch=1, micro_batch=1); c.storage()\n"
    script += "print([m for m in ('obstore', 'boto3', 's3fs', 'aiobotocore', 'aiohttp') if m in sys.modules])\n"
    script += "print(len(os.listdir('/proc/self/task')))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "AWS_PROFILE": "mine"},
    )
    assert found.stdout == "[]\n1\n"
