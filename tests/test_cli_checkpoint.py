"""`dtrain checkpoint`: what its commands print, find and delete, and with which exit code they end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtrain.checkpoint import newest
from dtrain.checkpoint.catalog import CHECKPOINTS
from dtrain.checkpoint.format import METADATA
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.reader import read_manifest
from dtrain.cli import checkpoint, table, transfer
from dtrain.observe.events import EVENTS, read_lines
from dtrain.storage.local import LocalStorage
from tests import checkpoint_command
from tests.checkpoint_command import Dtrain, model, save_steps
from tests.saving import Kept, Saver, delete, folder_of, log_of, save
from tests.world import alone, in_world

dtrain, run = checkpoint_command.dtrain, checkpoint_command.run


def test_ls_lists_what_is_there_and_with_all_what_was_deleted(tmp_path: Path, dtrain: Dtrain) -> None:
    save_steps(tmp_path / "run", keep_last=2)
    code, out, _ = dtrain("ls", tmp_path / "run")
    lines = [line.split() for line in out.splitlines()]
    assert (code, lines[0]) == (0, ["step", "epoch", "committed", "ago", "ranks", "size", "attempt", "state"])
    assert [(line[0], line[1], line[-1]) for line in lines[1:]] == [("20", "1", "good"), ("30", "1", "good")]
    rows = json.loads(dtrain("ls", tmp_path / "run", "--all", "--json")[1])
    assert [(row["step"], row["state"], row["ranks"]) for row in rows] == [
        (10, "retired", 2),
        (20, "good", 2),
        (30, "good", 2),
    ]
    assert list(rows[0]) == ["step", "epoch", "time", "ranks", "bytes", "attempt", "state", "reason"]
    folder = folder_of(tmp_path / "run", 30)
    assert rows[2]["attempt"] == folder.name
    assert rows[2]["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert [entry.bytes for entry in log_of(tmp_path / "run").commits()] == [row["bytes"] for row in rows[1:]]
    told = [line["bytes"] for line in read_lines(tmp_path / "run" / EVENTS) if line["event"] == "committed"]
    assert told == [row["bytes"] for row in rows]


def test_ls_tells_what_is_damaged_and_what_was_found_bad(run: Path, dtrain: Dtrain) -> None:
    (folder_of(run, 20) / "__1_0.distcp").unlink()
    attempt = folder_of(run, 10).name
    log = log_of(run)
    log.claim(time.time(), "x")
    log.append(Entry(kind="bad", epoch=log.epoch, time=0.0, step=10, attempt=attempt, reason="a byte is wrong"))
    code, out, _ = dtrain("ls", run)
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()[1:4]] == ["bad", "damaged", "good"]
    assert "step 10 is bad: a byte is wrong" in out
    assert "step 20 is damaged: " in out
    assert "__1_0.distcp" in out
    log.append(Entry(kind="good", epoch=log.epoch, time=0.0, step=10, attempt=attempt))
    _, out, _ = dtrain("ls", run)
    assert [line.split()[-1] for line in out.splitlines()[1:4]] == ["good", "damaged", "good"]
    assert "step 10 is bad" not in out


def test_show_has_objects_files_values_and_tensors(run: Path, dtrain: Dtrain) -> None:
    code, out, _ = dtrain("show", run, "--step", 30)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["4", "32", "128", "B", "0", "model"] in lines
    assert ["kept.rate", "0.25"] in lines
    assert ["float32", "5x3", "60", "B", "1", "model.0.weight"] in lines
    assert {"__0_0.distcp", "__1_0.distcp", METADATA} <= {line[-1] for line in lines if line}
    shown = json.loads(dtrain("show", run, "--json", "--tensors", "*.bias", "--values", "kept.*")[1])
    assert [(t["name"], t["dtype"], t["shape"], t["bytes"]) for t in shown["tensors"]] == [
        ("model.0.bias", "float32", [5], 20),
        ("model.1.bias", "float32", [2], 8),
    ]
    assert shown["values"] == {"kept.rate": "0.25", "kept.names": "['a']", "kept.nan": "nan", "kept.new": "(1, None)"}
    assert (shown["step"], shown["ranks"]) == (30, 2)


def test_diff_names_what_differs_without_reading_a_shard(run: Path, dtrain: Dtrain) -> None:
    for step in (20, 30):
        for shard in folder_of(run, step).glob("*.distcp"):
            os.truncate(shard, size := shard.stat().st_size)
            shard.write_bytes(bytes(size))  # of the right size, with none of the right bytes
    code, out, _ = dtrain("diff", run, 20, 30)
    assert code == 1
    assert out.splitlines()[0] == "tensors: 3 equal, 1 changed"
    found = json.loads(dtrain("diff", run, 20, 30, "--json")[1])
    assert found == {
        "equal": ["model.0.weight", "model.1.bias", "model.1.weight"],
        "changed": ["model.0.bias"],
        "reshaped": {},
        "only_old": [],
        "only_new": [],
        "unknown": [],
        "values": {"dtrain.step": ["20", "30"], "kept.new": [None, "(1, None)"], "kept.rate": ["0.5", "0.25"]},
    }
    assert dtrain("diff", run, 30, 30)[:2] == (0, "tensors: 4 equal\nvalues: 0 changed\n")


def test_diff_of_two_models_tells_shapes_and_what_only_one_has(tmp_path: Path, dtrain: Dtrain) -> None:
    def work() -> None:
        Saver(tmp_path, kept=Kept({"a": torch.ones(2), "b": torch.ones(2)})).save(1)
        Saver(tmp_path, kept=Kept({"a": torch.ones(2, 1).half(), "c": torch.ones(2)})).save(2)

    alone(work)
    code, out, _ = dtrain("diff", tmp_path, 1, 2)
    assert code == 1
    assert "1 another type or shape, 1 only in step 1, 1 only in step 2" in out
    assert "float32 2 -> float16 2x1" in out


def test_diff_tells_values_apart_that_python_writes_alike(tmp_path: Path, dtrain: Dtrain) -> None:
    """It abbreviates a long array, and rounds its numbers."""

    def work() -> None:
        long = np.arange(5000.0)
        value = {"long": long, "short": np.array([0.1234567890123]), "same": np.arange(3.0), "set": {"a", "b"}}
        saver = Saver(tmp_path, kept=Kept(value))
        saver.save(1)
        changed = {"long": np.where(long == 2500, -1, long), "short": np.array([0.1234567890456]), "set": {"b", "a"}}
        saver.state.objects["kept"].value = value | changed
        saver.save(2)

    alone(work)
    code, out, _ = dtrain("diff", tmp_path, 1, 2)
    assert (code, out.splitlines()[1]) == (1, "values: 3 changed")
    assert "array([0.12345679]) -> array([0.12345679]), not the same" in out
    assert list(json.loads(dtrain("diff", tmp_path, 1, 2, "--json")[1])["values"]) == [
        "dtrain.step",
        "kept.long",
        "kept.short",
    ]
    assert dtrain("diff", tmp_path, 2, 2)[:2] == (0, "tensors: 0 equal\nvalues: 0 changed\n")


def test_equal_tensors_have_equal_digests_whatever_process_saved_them(tmp_path: Path, dtrain: Dtrain) -> None:
    """And whichever of the ranks: of one, two and three, each a fork of its own."""
    for step, world in enumerate((1, 2, 3), 1):
        in_world(world, lambda rank, step=step: save(tmp_path, step, model=model()))  # type: ignore[misc]
    for step in (2, 3):
        found = json.loads(dtrain("diff", tmp_path, 1, step, "--json")[1])
        assert (len(found["equal"]), found["changed"], found["unknown"]) == (4, [], [])


def test_a_tensor_that_was_cut_in_another_way_is_not_called_equal_or_changed(tmp_path: Path, dtrain: Dtrain) -> None:
    from torch.distributed import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    for step, world in enumerate((2, 3), 1):

        def work(rank: int, step: int = step, world: int = world) -> None:
            tensor = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (world,)), [Shard(0)])
            save(tmp_path, step, kept=Kept({"w": tensor}))

        in_world(world, work)
    code, out, _ = dtrain("diff", tmp_path, 1, 2)
    assert code == 1
    assert "0 equal, 1 cut in another way" in out


@pytest.mark.parametrize("command", ["show", "export"])
def test_what_the_run_deletes_while_it_is_read_is_not_called_damaged(
    run: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    if command == "show":

        def found_then_deleted(*asked: Any) -> Entry:
            found = transfer.commit_at(*asked)
            delete(run, 30)
            return found

        monkeypatch.setattr(checkpoint, "commit_at", found_then_deleted)
        code, _, err = dtrain("show", run, "--step", 30)
    else:
        monkeypatch.setattr(transfer, "_bytes_of", lambda *_: delete(run, 30))
        code, _, err = dtrain("export", run, run.parent / "out.pt")
    assert code == 2
    assert err.endswith("the run has deleted step 30 while it was read; ask for a newer one\n")


@pytest.mark.parametrize("command", ["show", "export", "import"])
def test_a_newest_checkpoint_that_is_damaged_is_passed_over_with_a_word(
    run: Path, tmp_path: Path, dtrain: Dtrain, command: str
) -> None:
    missing = folder_of(run, 30) / "__1_0.distcp"
    missing.unlink()
    to = () if command == "show" else (tmp_path / "out",)
    code, out, err = dtrain(command, run, *to)
    assert code == 0
    assert folder_of(run, 20).name in out
    assert err == f"[dtrain] checkpoint of step 30 is damaged and passed over: {missing.relative_to(run)} is missing\n"
    code, _, err = dtrain(command, run, *to, "--step", 30)
    assert (code, err.endswith(f"{missing.relative_to(run)} is missing\n")) == (1, True), err


@pytest.mark.parametrize("command", ["show", "export", "import"])
def test_what_the_run_deletes_while_it_is_opened_gives_way_to_its_newest(
    run: Path, tmp_path: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def found_then_deleted(*asked: Any) -> Any:
        delete(run, 30)
        return read_manifest(*asked)

    monkeypatch.setattr(newest, "read_manifest", found_then_deleted)
    to = () if command == "show" else (tmp_path / "out",)
    kept = folder_of(run, 20).name
    code, out, err = dtrain(command, run, *to)
    assert (code, err) == (0, "")
    assert kept in out


def test_gc_lists_leftovers_and_deletes_them_only_when_told(run: Path, dtrain: Dtrain) -> None:
    committed = {path.name for path in (run / CHECKPOINTS).iterdir()}
    log = log_of(run)
    epoch = log.claim(time.time(), "x").epoch
    old, new = f"step-00000040.e{epoch - 1}.aaaaaaaa", f"step-00000040.e{epoch}.bbbbbbbb"
    for name in (old, new, "mine"):
        (run / CHECKPOINTS / name).mkdir()
        (run / CHECKPOINTS / name / "__0_0.distcp").write_bytes(bytes(1000))
    retired = folder_of(run, 10)
    log.append(Entry(kind="retire", epoch=epoch, time=0.0, step=10, attempt=retired.name))
    halves = [run / ".probe.1.half", run / FOLDER / ".00000009.json.1.half"]
    for half in [*halves, run / ".young.half"]:
        half.write_bytes(b"x")
    assert dtrain("gc", run)[1] == "nothing is left over\n", "somebody may still be at work on it"
    for old_file in [*halves, *(run / CHECKPOINTS).glob("*/*")]:
        os.utime(old_file, (time.time() - 700, time.time() - 700))
    before = sorted(run.rglob("*"))
    code, out, _ = dtrain("gc", run)
    assert (code, sorted(run.rglob("*"))) == (0, before)
    assert [line.split()[-1] for line in out.splitlines()[1:5]] == [
        f"{CHECKPOINTS}/{retired.name}",
        f"{CHECKPOINTS}/{old}",
        ".probe.1.half",
        f"{FOLDER}/.00000009.json.1.half",
    ]
    rows = json.loads(dtrain("gc", run, "--delete", "--json")[1])
    assert [row["deleted"] for row in rows] == [True] * 4
    assert {path.name for path in (run / CHECKPOINTS).iterdir()} == (committed - {retired.name}) | {new, "mine"}
    assert (run / ".young.half").exists()
    assert not any(half.exists() for half in halves)
    assert dtrain("gc", run)[1] == "nothing is left over\n"
    assert dtrain("verify", run, "--all")[0] == 0


def test_gc_deletes_no_attempt_while_the_log_cannot_be_read(run: Path, dtrain: Dtrain) -> None:
    log_of(run).claim(time.time(), "x")
    entry = run / FOLDER / "00000003.json"
    entry.write_bytes(entry.read_bytes()[:-9])
    before = sorted(run.rglob("*"))
    code, out, _ = dtrain("gc", run, "--delete")
    assert (code, sorted(run.rglob("*"))) == (0, before)
    assert "attempts are kept as long as the log can't be read: log/00000003.json" in out


@pytest.mark.parametrize("command", ["ls", "show", "verify", "gc"])
def test_what_is_no_run_folder_is_an_error_in_one_line(tmp_path: Path, dtrain: Dtrain, command: str) -> None:
    code, out, err = dtrain(command, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err == f"dtrain: error: {tmp_path / 'nothing'} doesn't exist; give the `dir` of a run\n"
    code, _, err = dtrain(command, tmp_path)
    assert code == 2
    assert "is no run folder: it has no log/ in it" in err


def test_a_step_that_is_not_there_names_those_that_are(tmp_path: Path, dtrain: Dtrain) -> None:
    save_steps(tmp_path / "run", keep_last=2)
    for arguments in (["show", "--step", 11], ["verify", "--step", 11], ["diff", 11, 20]):
        code, _, err = dtrain(arguments[0], tmp_path / "run", *arguments[1:])
        assert code == 2
        assert err.endswith("has no checkpoint of step 11; there are: 20, 30\n")
    assert "deleted its checkpoint of step 10; there are: 20, 30" in dtrain("show", tmp_path / "run", "--step", 10)[2]
    assert dtrain("verify", tmp_path / "run", "--all", "--step", 20)[0] == 2


def test_a_ranking_where_nothing_was_measured_says_where_metrics_come_from(run: Path, dtrain: Dtrain) -> None:
    code, _, err = dtrain("best", run)
    assert code == 2
    assert err.endswith(
        ": none of its checkpoints has a metric: they come from run.evaluate or run.save(metrics=...)\n"
    )


def test_a_ranking_has_what_was_found_bad_where_there_is_nothing_else(tmp_path: Path, dtrain: Dtrain) -> None:
    log = Log(LocalStorage(str(tmp_path)))
    log.claim(0.0, "")
    (tmp_path / "checkpoints").mkdir()
    for kind in ("commit", "bad"):
        for step in (10, 20):
            metrics = {"val": float(step)} if kind == "commit" else {}
            log.append(Entry(kind=kind, epoch=1, time=0.0, step=step, attempt=f"{step}", metrics=metrics))
    code, out, _ = dtrain("best", tmp_path, "--metric", "val", "--mode", "min", "--json")
    assert (code, [row["step"] for row in json.loads(out)]) == (0, [10])


def test_tables_fit_a_terminal_of_80_columns(run: Path, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "width", lambda: 80)
    monkeypatch.setattr(checkpoint, "width", lambda: 80)
    for arguments in (["ls", run, "--all"], ["show", run], ["diff", run, 20, 30]):
        assert max(map(len, dtrain(*arguments)[1].splitlines())) <= 80


def test_sizes_and_ages_are_short() -> None:
    sizes = [0, 999, 1000, 9994, 9996, 99_949, 99_951, 999_499, 999_500, 5_000_000_000, 2 * 10**15]
    assert [table.size_text(size) for size in sizes] == [
        "0 B", "999 B", "1.00 kB", "9.99 kB", "10.0 kB", "99.9 kB", "100 kB", "999 kB", "1.00 MB", "5.00 GB", "2.00 PB",
    ]  # fmt: skip
    assert [table.age_text(s) for s in (0, 59, 60, 7199, 7200, 172_799, 172_800)] == [
        "0 s", "59 s", "1 min", "119 min", "2 h", "47 h", "2 d",
    ]  # fmt: skip
