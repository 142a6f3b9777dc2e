"""`dtrain checkpoint verify`: every byte that isn't as it was saved, named."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import (
    MANIFEST,
    METADATA,
    Manifest,
    Part,
    digest,
    hash_item,
    json_text,
    tensors_to_json,
)
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.sources import open_source
from dtrain.checkpoint.verify import verify, verify_log
from dtrain.cli import checkpoint, transfer
from dtrain.storage.local import LocalStorage
from tests import checkpoint_command
from tests.checkpoint_command import Dtrain
from tests.saving import condemn_all, folder_of, log_of

dtrain, run = checkpoint_command.dtrain, checkpoint_command.run


def test_verify_of_a_good_run_ends_with_0(run: Path, dtrain: Dtrain) -> None:
    code, out, _ = dtrain("verify", run, "--all")
    assert code == 0
    assert [line.partition(",")[0] for line in out.splitlines()] == [
        "step 10: good",
        "step 20: good",
        "step 30: good",
        "log: good",
    ]
    found = json.loads(dtrain("verify", run, "--step", 20, "--json")[1])
    assert [(row["step"], row["faults"], row["deleted"]) for row in found["checkpoints"]] == [(20, [], False)]
    assert found["checkpoints"][0]["bytes"] == sum(p.stat().st_size for p in folder_of(run, 20).iterdir())
    assert found["log"] == []


def test_where_all_were_found_bad_the_newest_is_looked_at_all_the_same(run: Path, dtrain: Dtrain) -> None:
    condemn_all(run)
    for command in ("verify", "show"):
        code, out, _ = dtrain(command, run)
        assert (code, out.startswith("step 30")) == (0, True), out
    (run / FOLDER / "00000000.json").unlink()
    code, out, _ = dtrain("verify", run)
    assert (code, out.startswith("step 30: good")) == (1, True), out


def test_verify_finds_every_flipped_bit_and_names_its_file(run: Path) -> None:
    folder = folder_of(run, 30)
    commit = log_of(run).commits()[-1]
    source = open_source(run)
    tried = 0
    chance = random.Random(0)
    for path in sorted([*folder.iterdir(), *(run / FOLDER).iterdir()]):
        data = path.read_bytes()
        places = set(range(0, len(data), max(1, len(data) // 60))) | {len(data) - 1}
        if path.suffix == ".distcp":
            items = [c for i in source.manifest.tensors.values() for c in i.chunks]
            held = sorted((c.offset, c.offset + c.length) for c in items if c.file == path.name)
            ends = [end for (_, end), (start, _) in itertools.pairwise(held) if end < start]
            assert ends, "there is padding"
            places |= set(ends)
        for at in sorted(places):
            broken = bytearray(data)
            broken[at] ^= 1 << chance.randrange(8)
            path.write_bytes(broken)
            log = log_of(run)
            name = str(path.relative_to(run))
            faults = verify_log(log._storage, log) or verify(log._storage, log, commit).faults
            assert [fault.file for fault in faults] == [name], (name, at)
            if path.suffix == ".distcp":
                assert faults[0].start <= at < faults[0].stop
            tried += 1
        path.write_bytes(data)
    assert tried > 500
    assert verify(log_of(run)._storage, log_of(run), commit).faults == []


def test_verify_names_the_tensor_the_file_and_the_bytes(run: Path, dtrain: Dtrain) -> None:
    source = open_source(run)
    chunk = source.manifest.tensors["model.0.weight"].chunks[0]
    path = folder_of(run, 30) / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.payload + 1] ^= 64
    path.write_bytes(data)
    code, out, _ = dtrain("verify", run)
    assert code == 1
    assert out.splitlines()[0].startswith("step 30: 1 fault, ")
    place = f"{path.relative_to(run)}, bytes {chunk.offset} to {chunk.offset + chunk.length}"
    assert out.splitlines()[1:3] == [f"  {place}", "    not what was saved: model.0.weight"]
    assert dtrain("verify", run, "--step", 20)[0] == 0
    assert dtrain("verify", run, "--all")[0] == 1


@pytest.mark.parametrize("file", [MANIFEST, METADATA, "__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "shorter", "longer"])
def test_verify_finds_files_that_are_missing_or_of_another_size(run: Path, dtrain: Dtrain, file: str, how: str) -> None:
    path = folder_of(run, 30) / file
    if how == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if how == "shorter" else data + b"\0")
    code, out, _ = dtrain("verify", run)
    assert code == 1
    assert f"{CHECKPOINTS}/{path.parent.name}/{file}" in out


def test_verify_finds_a_log_entry_that_is_gone_or_no_entry(run: Path, dtrain: Dtrain) -> None:
    (run / FOLDER / "00000001.json").unlink()
    (run / FOLDER / "00000003.json").write_text("{}")
    code, out, _ = dtrain("verify", run, "--json")
    assert code == 1
    found = json.loads(out)["log"]
    assert [(fault["file"], fault["what"].partition(" (")[0]) for fault in found] == [
        (f"{FOLDER}/00000001.json", "missing"),
        (f"{FOLDER}/00000003.json", "no log entry"),
    ]


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_no_fault(
    run: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log that the command has read doesn't tell of it yet."""
    command = transfer.open_run

    def opened_then_deleted(folder: str, storage_option: Sequence[str]) -> Any:
        opened = command(folder, storage_option)
        log = log_of(run)
        log.claim(time.time(), "x")
        log.append(Entry(kind="retire", epoch=log.epoch, time=0.0, step=10, attempt=folder_of(run, 10).name))
        shutil.rmtree(folder_of(run, 10))
        return opened

    monkeypatch.setattr(transfer, "open_run", opened_then_deleted)
    code, out, _ = dtrain("verify", run, "--all")
    assert (code, out.splitlines()[0]) == (0, "step 10: the run has deleted it in the meantime")
    monkeypatch.setattr(checkpoint, "open_run", command)
    assert dtrain("ls", run)[1].count("good") == 2


def _of_many_ranks(root: Path, ranks: int, tensors: int = 200) -> Path:
    """A run whose checkpoint has a file of each rank, and in each a byte of every tensor."""
    storage, folder, data = LocalStorage(str(root)), f"{CHECKPOINTS}/step-00000001.e1.0", bytes(tensors)
    (root / folder).mkdir(parents=True)
    parts = []
    for rank in range(ranks):
        file = f"__{rank}_0.distcp"
        (root / folder / file).write_bytes(data)
        items = [[f"model.{number}", number, 1, 0, [rank], [1]] for number in range(tensors)]
        parts.append(Part(file=file, size=tensors, items=json_text(items), digests=hash_item(memoryview(data), 1)))
    (root / folder / METADATA).write_bytes(b"")
    tree = json_text({"model": {str(number): {"$tensor": f"model.{number}"} for number in range(tensors)}})
    shapes = tensors_to_json({f"model.{number}": ("uint8", [ranks]) for number in range(tensors)})
    manifest = Manifest.join(parts, step=1, world_size=ranks, tree=tree, tensors=shapes, index=b"")
    (root / folder / MANIFEST).write_bytes(manifest)
    log = Log(storage)
    log.claim(0.0, "0")
    name = Path(folder).name
    log.append(Entry(kind="commit", epoch=1, time=0.0, step=1, attempt=name, manifest=digest(manifest)))
    return root


def test_eight_times_the_ranks_take_about_eight_times_as_long(tmp_path: Path, dtrain: Dtrain) -> None:
    few, many = (_of_many_ranks(tmp_path / str(ranks), ranks) for ranks in (40, 320))

    def seconds(command: str, run: Path) -> float:
        gc.disable()  # its time depends on all that there is
        try:
            begun = time.process_time()
            assert dtrain(command, run)[0] == 0
            return time.process_time() - begun
        finally:
            gc.enable()

    for command in ("verify", "show"):
        shortest = min(seconds(command, few) for _ in range(3))
        assert seconds(command, many) < 20 * shortest, command


def test_a_place_that_can_not_be_reached_is_no_damage(run: Path) -> None:
    class Away(LocalStorage):
        def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

    log = log_of(run)
    with pytest.raises(OSError, match="Stale file handle"):
        verify(Away(str(run)), log, log.commits()[-1])
