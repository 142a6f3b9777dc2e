"""`dtrain checkpoint verify`: every byte that isn't as it was saved, named."""

from __future__ import annotations

import errno
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
from dtrain.checkpoint.format import MANIFEST, METADATA
from dtrain.checkpoint.log import FOLDER, Entry
from dtrain.checkpoint.sources import open_source
from dtrain.checkpoint.verify import verify, verify_log
from dtrain.cli import checkpoint, transfer
from dtrain.storage.local import LocalStorage
from tests import checkpoint_command
from tests.checkpoint_command import Dtrain
from tests.saving import folder_of, log_of

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


def test_a_place_that_can_not_be_reached_is_no_damage(run: Path) -> None:
    class Away(LocalStorage):
        def read_into(self, path: str, offset: int, buffers: Sequence[memoryview]) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

    log = log_of(run)
    with pytest.raises(OSError, match="Stale file handle"):
        verify(Away(str(run)), log, log.commits()[-1])
