"""`dtrain checkpoint export | import`: that they go round, what they refuse, and that nothing is left of that."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch

from dtrain.checkpoint import adopt
from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.sources import open_source
from tests import checkpoint_command
from tests.checkpoint_command import Dtrain
from tests.saving import folder_of, log_of

dtrain, run = checkpoint_command.dtrain, checkpoint_command.run
NO_ROOM = "dtrain: error: {}: No space left on device; make room there, or choose another place\n"


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({"model": {"weight": torch.ones(2, 3)}, "parts": [torch.ones(2)]}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dtrain", "a run tracks nothing by the name 'dtrain': track(dtrain=...): the name is taken"),
        ("a.b", "a run tracks nothing by the name 'a.b': track('a.b'): a name has no dots"),
        ("$x", "a run tracks nothing by the name '$x': track('$x'): a name has no dots, and no dollar"),
        ("", "the weights need the name that a run tracks them by"),
    ],
)
def test_an_import_by_a_name_that_no_run_could_track_is_refused(
    weights: Path, tmp_path: Path, dtrain: Dtrain, name: str, message: str
) -> None:
    code, _, err = dtrain("import", weights, tmp_path / "run", "--object", name, "--key", "model")
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["model.weight", "parts"])
def test_an_import_of_a_single_tensor_or_a_list_is_refused(
    weights: Path, tmp_path: Path, dtrain: Dtrain, key: str
) -> None:
    code, _, err = dtrain("import", weights, tmp_path / "run", "--key", key)
    assert (code, f"{key} is not the state of an object; name the dict" in err) == (2, True), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e300"])
def test_an_export_in_files_of_a_size_that_can_not_be_is_refused(
    weights: Path, tmp_path: Path, dtrain: Dtrain, size: str
) -> None:
    code, _, err = dtrain("export", weights, tmp_path / "out", "--shard-gb", size)
    assert (code, err) == (2, f"dtrain: error: --shard-gb {float(size)}: give a number above 0, such as 5\n")
    assert not (tmp_path / "out").exists()


def test_export_and_import_go_round(run: Path, tmp_path: Path, dtrain: Dtrain) -> None:
    code, out, _ = dtrain("export", run, tmp_path / "out")
    assert code == 0
    assert out.splitlines()[1:] == [str(tmp_path / "out/model.safetensors")]
    code, out, _ = dtrain("import", tmp_path / "out", tmp_path / "new", "--json")
    assert (code, json.loads(out)["bytes"]) == (0, 128)
    assert dtrain("verify", tmp_path / "new")[0] == 0
    one, other = open_source(run).manifest, open_source(tmp_path / "new").manifest
    assert [i.chunks[0].digests for i in other.tensors.values()] == [
        one.tensors[name].chunks[0].digests for name in other.tensors
    ]
    assert dtrain("export", run, tmp_path / "all.safetensors", "--all", "--step", 20)[0] == 0
    code, out, err = dtrain("export", run, tmp_path / "out")
    assert (code, out, err) == (2, "", f"dtrain: error: {tmp_path / 'out'} is there already; --force replaces it\n")
    assert dtrain("export", run, tmp_path / "out", "--force")[0] == 0


def test_an_import_never_takes_a_run_over_that_has_begun(run: Path, tmp_path: Path, dtrain: Dtrain) -> None:
    begun = tmp_path / "begun"
    log_of(begun).claim(time.time(), "x")
    (begun / "config.json").write_text("{}")
    assert dtrain("import", run, begun)[::2] == (
        2,
        f"dtrain: error: {begun} has a config.json: a run has begun there, and may be alive; give a new folder\n",
    )
    assert log_of(begun).epoch == 1


def test_an_export_without_room_names_the_place_and_the_remedy(
    run: Path, tmp_path: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_room)
    assert dtrain("export", run, tmp_path / "out.pt") == (2, "", NO_ROOM.format(tmp_path / "out.pt"))
    assert list(tmp_path.iterdir()) == [run]


def test_an_import_without_room_says_so_too_and_leaves_no_half_of_a_checkpoint(
    run: Path, tmp_path: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adopt, "_write_item", no_room)
        assert dtrain("import", run, tmp_path / "new") == (2, "", NO_ROOM.format(tmp_path / "new"))
    assert list((tmp_path / "new" / CHECKPOINTS).iterdir()) == []
    assert dtrain("import", run, tmp_path / "new")[0] == 0


def test_a_damaged_checkpoint_ends_an_export_with_1(run: Path, tmp_path: Path, dtrain: Dtrain) -> None:
    for shard in folder_of(run, 30).glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    code, out, err = dtrain("export", run, tmp_path / "out.pt")
    assert (code, out) == (1, "")
    assert err.startswith("dtrain: damaged: ")
    assert re.search(r"bytes \d+ to \d+ are not those that were saved \(model\.[01]\.(weight|bias)\)$", err), err
    assert not (tmp_path / "out.pt").exists()
