"""`dtrain checkpoint export | import`: what they refuse, and that nothing is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import checkpoint_command
from tests.checkpoint_command import Dtrain

dtrain = checkpoint_command.dtrain


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
