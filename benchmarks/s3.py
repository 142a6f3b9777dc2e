"""What a checkpoint in a bucket costs: dtrain beside others who save sharded state there, all on one real S3 server.

The server is SeaweedFS, started here on 127.0.0.1: it shares the machine's processors with everybody. The state is
that of `checkpoint.py`, sharded by FSDP2 where there are several ranks. All take turns; a figure is the median of the
rounds, and of several ranks the slowest one counts.

- upload: from the call of save until the state is in the bucket: with dtrain, until it is committed.
- download: into the training's own tensors, every byte checked with dtrain, none with the others.
- The limit is the better of two bare multipart uploads of one object a rank, from one piece of memory into which it is
  read again by ranges: by obstore, and by boto3 in threads. No framework, no index, no digests but the client's own.
- plain s3fs: `pipe_file` and `cat_ranges`, with parts of the same size.
- DCP, fsspec: stock `dcp.save` and `dcp.load` with torch's own FsspecWriter and FsspecReader, on s3fs.
- s3torchconnector: `dcp.save` and `dcp.load` with its S3StorageWriter and S3StorageReader.

    python benchmarks/s3.py
    python benchmarks/s3.py --mib 256 --ranks 1 --rounds 1
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from checkpoint_dtrain import Dtrain
from checkpoint_peers import Limits, Training
from checkpoint_report import Promises, middle
from checkpoint_world import MIB, World
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from dtrain.cli.s3_server import BUCKET, seaweed

_PART_BYTES = 16 * MIB
_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure uploads and downloads; lists are given with commas."""

    mib: int = 1024
    """Of state, over all ranks together."""

    ranks: str = "1,2"
    """Processes."""

    rounds: int = 3
    """Saves and loads by each, after one that isn't counted."""

    only: str = ""
    """Of the rows, these, with semicolons between them."""

    disk: Path = Path(tempfile.gettempdir())
    """Where the server keeps what it is given; all of it is deleted again."""


class Bare:
    """One object a rank, by ranges. The subclasses say with which client."""

    def __init__(self, training: Training, place: str) -> None:
        limits = Limits(training)
        limits.copy()
        self.memory = memoryview(limits.memory.numpy().data)
        self._prefix, self._count = place.removeprefix(f"s3://{BUCKET}/"), 0
        self.ranges = [
            (at, min(self.memory.nbytes, at + _PART_BYTES)) for at in range(0, self.memory.nbytes, _PART_BYTES)
        ]
        self.pool = ThreadPoolExecutor(_AT_ONCE)

    @property
    def key(self) -> str:
        return f"{self._prefix}/{self._count}/{dist.get_rank()}"

    def save(self, training: Training) -> None:
        self._count += 1
        self.put()

    def load(self, training: Training) -> None:
        for _ in self.pool.map(self.get, self.ranges):
            pass

    def put(self) -> None:
        raise NotImplementedError

    def get(self, part: tuple[int, int]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.pool.shutdown()


class Obstore(Bare):
    """A multipart upload by obstore."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(training, place)
        from obstore.store import S3Store

        self._store = S3Store(
            BUCKET,
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def put(self) -> None:
        import obstore

        obstore.put(
            self._store, self.key, self.memory, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=_AT_ONCE
        )

    def get(self, part: tuple[int, int]) -> None:
        import obstore

        begin, end = part
        self.memory[begin:end] = memoryview(obstore.get_range(self._store, self.key, start=begin, end=end))


class Boto(Bare):
    """A multipart upload by boto3, in threads."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(training, place)
        self._client = _boto()

    def put(self) -> None:
        place = {"Bucket": BUCKET, "Key": self.key}
        upload = self._client.create_multipart_upload(**place)["UploadId"]

        def part(number: int) -> dict[str, Any]:
            begin, end = self.ranges[number - 1]
            body = bytes(self.memory[begin:end])  # it takes no memoryview
            done = self._client.upload_part(**place, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": done["ETag"], "ChecksumCRC32": done["ChecksumCRC32"]}

        parts = list(self.pool.map(part, range(1, len(self.ranges) + 1)))
        self._client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})

    def get(self, part: tuple[int, int]) -> None:
        begin, end = part
        body = self._client.get_object(Bucket=BUCKET, Key=self.key, Range=f"bytes={begin}-{end - 1}")["Body"]
        self.memory[begin:end] = body.read()


class S3fs(Bare):
    """s3fs's own way to write and read from memory."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(training, place)
        import s3fs

        self._fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def put(self) -> None:
        self._fs.pipe_file(f"{BUCKET}/{self.key}", bytes(self.memory), chunksize=_PART_BYTES)

    def load(self, training: Training) -> None:
        begins, ends = zip(*self.ranges, strict=True)
        parts = self._fs.cat_ranges([f"{BUCKET}/{self.key}"] * len(begins), list(begins), list(ends))
        for begin, end, data in zip(begins, ends, parts, strict=True):
            self.memory[begin:end] = data


class DcpFsspec:
    """Stock DCP with its writer and reader for fsspec."""

    def __init__(self, training: Training, place: str) -> None:
        self._place, self._count = place, 0

    def _next(self) -> str:
        return f"{self._place}/{self._count}"

    def writer(self) -> Any:
        return FsspecWriter(self._next(), sync_files=False)  # True would sync all of the machine's disks

    def reader(self) -> Any:
        return FsspecReader(self._next())

    def save(self, training: Training) -> None:
        self._count += 1
        dcp.save(training.state_dict(), storage_writer=self.writer())

    def load(self, training: Training) -> None:
        dcp.load(training.state_dict(), storage_reader=self.reader())

    def close(self) -> None:
        pass


class Connector(DcpFsspec):
    """Stock DCP with s3torchconnector's writer and reader."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(training, place)
        from s3torchconnector import S3ClientConfig

        self._options: dict[str, Any] = {
            "region": "us-east-1",
            "s3client_config": S3ClientConfig(force_path_style=True),
        }

    def writer(self) -> Any:
        from s3torchconnector.dcp import S3StorageWriter

        return S3StorageWriter(path=self._next(), **self._options)

    def reader(self) -> Any:
        from s3torchconnector.dcp import S3StorageReader

        return S3StorageReader(path=self._next(), **self._options)


class OnBucket(Dtrain):
    """dtrain. :param client: its way to S3."""

    def __init__(self, training: Training, place: str, client: str) -> None:
        self._local = tempfile.TemporaryDirectory()
        super().__init__(training, place, local_dir=self._local.name, storage_options={"client": client})

    def save(self, training: Training) -> float:
        stall = super().save(training)
        self.wait()
        return stall

    def close(self) -> None:
        super().close()
        self._local.cleanup()


ROWS: Mapping[str, Callable[[Training, str], Any]] = {
    "dtrain": partial(OnBucket, client="obstore"),
    "dtrain, s3fs": partial(OnBucket, client="s3fs"),
    "limit, obstore": Obstore,
    "limit, boto3": Boto,
    "plain s3fs": S3fs,
    "DCP, s3torchconnector": Connector,
    "DCP, fsspec": DcpFsspec,
}


@dataclass
class Times:
    """Of one row, in seconds, round by round; the slowest rank's."""

    upload: list[float] = field(default_factory=list)
    download: list[float] = field(default_factory=list)


def measure(o: Options, say: Callable[[str], None]) -> tuple[dict[str, Times], int]:
    """In each rank's process."""
    training = Training(o.mib * MIB, sharded=dist.get_world_size() > 1, device=torch.device("cpu"))
    limits = Limits(training)
    limits.copy()
    found: dict[str, Times] = {}
    names = [name for name in ROWS if not o.only or name in o.only.split(";")]
    engines = {
        name: ROWS[name](training, f"s3://{BUCKET}/{n}-of-{dist.get_world_size()}") for n, name in enumerate(names)
    }
    for number, (place, (name, engine)) in itertools.product(range(o.rounds + 1), enumerate(engines.items())):
        say(f"round {number} of {o.rounds}: {name}")
        upload = _timed(partial(engine.save, training))
        if not isinstance(engine, Bare):
            training.blank()
        download = _timed(partial(engine.load, training))
        if differ := limits.differ():
            raise AssertionError(f"{name}: {differ} tensors came back other than they were saved")
        if dist.get_rank() == 0 and not isinstance(engine, Dtrain):
            _delete(f"{place}-of-{dist.get_world_size()}/")
        dist.barrier()
        if number:
            found.setdefault(name, Times()).upload.append(upload)
            found[name].download.append(download)
    for engine in engines.values():
        engine.close()
    return found, sum(_gathered(training.nbytes))


def _timed(work: Callable[[], object]) -> float:
    """How long the slowest rank takes."""
    dist.barrier()
    started = time.perf_counter()
    work()
    slowest: float = max(_gathered(time.perf_counter() - started))
    return slowest


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _boto() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}, max_pool_connections=_AT_ONCE))


def _delete(prefix: str) -> None:
    client = _boto()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])


def show(ranks: int, found: dict[str, Times], nbytes: int, promises: Promises) -> None:
    print(f"\n{ranks} rank{'s' if ranks > 1 else ''}, {nbytes / MIB:.0f} MiB together\n")
    print(f"{'':24} {'upload':>8} {'MB/s':>6} {'of dtrain':>10}   {'download':>8} {'MB/s':>6} {'of dtrain':>10}")
    own = found.get("dtrain", Times())
    for name, times in found.items():
        cells = []
        for part in ("upload", "download"):
            seconds: list[float] = getattr(times, part)
            ratio = statistics.median(a / b for a, b in zip(seconds, getattr(own, part) or seconds, strict=True))
            cells.append(f"{middle(seconds):6.2f} s {nbytes / 1e6 / middle(seconds):6.0f} {ratio:10.2f}")
        print(f"{name:24} {'   '.join(cells)}")
    if not own.upload:
        return
    for part in ("upload", "download"):
        mine = middle(getattr(own, part))
        others = {name: middle(getattr(times, part)) for name, times in found.items() if not name.startswith("dtrain")}
        where = f"{ranks} rank{'s' if ranks > 1 else ''}"
        if others:
            promises.add(f"{part} >= 0.85 of the best of all", where, min(others.values()) / mine, 0.85)
        if "DCP, fsspec" in others:
            promises.add(f"{part} >= 3 of DCP, fsspec", where, others["DCP, fsspec"] / mine, 3.0)


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    processors = len(os.sched_getaffinity(0))
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {processors} processors, torch {torch.__version__}")
    print(f"python benchmarks/s3.py {' '.join(sys.argv[1:])}".rstrip())
    promises = Promises()
    for ranks in map(int, o.ranks.split(",")):
        with tempfile.TemporaryDirectory(dir=o.disk) as folder, seaweed(Path(folder), memory="4GiB") as server:
            os.environ |= server.environment
            found, nbytes = World([]).run(ranks, partial(measure, o))
            show(ranks, found, nbytes, promises)
    promises.print()


if __name__ == "__main__":
    main()
