"""What a user sees who starts a run in a way that can't work: the value, the reason, the remedy, and soon."""

from __future__ import annotations

import dataclasses
import json
import re
import traceback
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain.elastic.process import fork
from dtrain.errors import ConfigError, UsageError
from dtrain.observe.events import EVENTS, read_lines
from dtrain.training.folder import _open
from tests.saving import commits
from tests.scripts import run, started

PLANTED = "ArithmeticError: planted at step {} on rank {}"


def events(root: Path, kind: str) -> list[dict[str, object]]:
    return [line for line in read_lines(root / EVENTS) if line["event"] == kind]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("savevery", "3"), "unknown option 'savevery'; did you mean 'save_every'?"),
        (("colour", "red"), "unknown option 'colour'; there are: dir, global_batch, micro_batch, seed, parallel,"),
        (("save_every", "often"), "save_every='often' is no interval; write a number of steps (200), or a text such"),
        (("keep_last", "many"), "keep_last='many' must be a whole number, 2 or more"),
        (("dir", "s3:///run"), "dir='s3:///run' must be like s3://bucket/prefix"),
        (("storage_options", {"region": "x"}), "storage_options (region) are for a dir that is a URL; leave them out"),
        (("cpu_offload", True), "cpu_offload=True needs parallel='fsdp' or 'hsdp'"),
        (("tensor_parallel", 2), "tensor_parallel=2 needs parallel='fsdp' or 'hsdp'"),
        (("unsafe_commit", "no"), "unsafe_commit='no' must be True or False"),
        (("global_batch", 10), "global_batch=10 is no multiple of micro_batch=4; a step is a list of whole"),
    ],
)
def test_an_option_that_can_not_be_right_is_named_with_its_value(
    tmp_path: Path, option: tuple[str, object], message: str
) -> None:
    options: dict[str, object] = {"dir": str(tmp_path), "global_batch": 8, "micro_batch": 4}
    with pytest.raises(ConfigError) as found:
        dtrain.Config(**(options | dict([option])))  # type: ignore[arg-type]
    assert str(found.value).startswith(message)


def test_a_config_can_be_made_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dtrain.Config(dir=str(tmp_path), global_batch=8, micro_batch=4, notice_file="~/notice")
    other = dataclasses.replace(config, seed=3)
    assert (other.seed, other.local_dir, other.notice_file) == (3, str(tmp_path), str(tmp_path / "notice"))


def test_a_launch_of_something_else_is_refused(tmp_path: Path) -> None:
    config = dtrain.Config(dir=str(tmp_path), global_batch=8, micro_batch=4)
    with pytest.raises(UsageError, match=r"launch\(function, dict\): give the training function, and a dtrain.Config"):
        dtrain.launch(lambda run: None, {"dir": "x"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"launch\(NoneType, Config\): give the training function"):
        dtrain.launch(None, config)  # type: ignore[arg-type]


def test_an_unknown_option_ends_a_script_with_a_suggestion(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "--option", "micro_bach", "3", fresh=True)
    assert (found.code, found.out) == (1, "")
    assert found.err.splitlines()[-1] == "ConfigError: unknown option 'micro_bach'; did you mean 'micro_batch'?"
    assert not (tmp_path / "run").exists()


def assert_stopped(err: list[str], code: int, *parts: str) -> None:
    """dtrain's own error: said once, at the first generation, without a traceback."""
    assert code == 1
    text = "\n".join(err)
    assert text.count("stopped: ") == 1, text
    for part in parts:
        assert part in text
    assert "starting it again" not in text


def test_a_run_folder_of_another_config_is_refused_with_both_values(tmp_path: Path) -> None:
    assert run(tmp_path, "--steps", 2).code == 0
    before = commits(tmp_path)
    found = run(tmp_path, "--seed", 5, "--global-batch", 16)
    assert_stopped(
        found.said,
        found.code,
        f"{tmp_path} belongs to a run with other options: global_batch was 8, is now 16; seed was 0, is now 5. "
        "Put them back, or choose another folder",
    )
    assert "Traceback" not in found.err
    assert (commits(tmp_path), before) == ([2], [2])


@pytest.mark.parametrize("text", ["[]", "{}", "null", "3", '{"seed": 0}'])
def test_a_run_folder_whose_options_are_gone_is_refused_with_a_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    config = dtrain.Config(dir=str(tmp_path), global_batch=8, micro_batch=4)
    message = "config.json can't be read (it doesn't hold the options of a run); bring it back or delete it"
    with pytest.raises(ConfigError, match=re.escape(message)):
        _open(config, [config.storage()])
    (tmp_path / "config.json").write_text('{"global_batch": 8, "micro_batch": 4, "seed": 0}')
    assert _open(config, [config.storage()]) == ("", 1), "of a time when there were no others"


def test_a_path_below_a_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    found = run(tmp_path / "file" / "run")
    message = f"{tmp_path}/file/run can't be written to (Not a directory); choose another folder"
    assert_stopped(found.said, found.code, message)


def test_more_ranks_than_micro_batches_are_refused_on_all_and_said_once(tmp_path: Path) -> None:
    found = run(tmp_path, "--global-batch", 8, "--micro-batch", 8, ranks=2)
    assert_stopped(found.said, found.code, "2 ranks share 1 micro-batches (global_batch=8 / micro_batch=8): start at")
    assert "Traceback (most recent call last)" not in found.err.partition("ChildFailedError")[0].partition("\nTrace")[0]
    assert "gloo" not in found.err.lower(), "a rank was left alone while it connected"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--samples", 0), "data: the data set is empty; check the path or the filter that made it"),
        (("--samples", 7), "data: the data set has 7 samples, less than one step's global_batch=8; add data or make"),
        (
            ("--iterable",),
            "data: a Endless is no map-style data set (with __len__ and __getitem__), and as an",
        ),
    ],
)
def test_a_data_set_that_can_not_be_trained_on_is_refused(
    tmp_path: Path, args: tuple[object, ...], message: str
) -> None:
    found = run(tmp_path, *args)
    assert_stopped(found.said, found.code, message)


@pytest.mark.parametrize("args", [("--samples", 33), ("--first-sample", 0.5)])
def test_another_data_set_than_that_of_the_checkpoint_is_refused(tmp_path: Path, args: tuple[object, ...]) -> None:
    assert run(tmp_path, "--steps", 2).code == 0
    found = run(tmp_path, *args)
    assert_stopped(found.said, found.code, "data: the data set is not the one that the checkpoint was made with")
    assert commits(tmp_path) == [2]


def test_another_model_than_that_of_the_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    assert run(tmp_path, "--steps", 2).code == 0
    found = run(tmp_path, "--width", 9)
    assert_stopped(found.err.splitlines(), found.code, "model.weight: saved with shape (1, 8), now (1, 9)")
    assert commits(tmp_path) == [2]


def test_threads_before_launch_are_named(tmp_path: Path) -> None:
    found = run(tmp_path, "--thread")
    assert found.code == 1
    assert "threads were started before dtrain.launch (early bird): a forked trainer could hang." in found.err
    assert found.out == ""


@pytest.mark.parametrize("late_s", [0, 2], ids=["both_at_once", "the_first_comes_later"])
def test_a_script_that_ends_with_an_error_that_would_come_again_is_not_started_again_by_torchrun(
    tmp_path: Path, late_s: int
) -> None:
    found = run(tmp_path, "--thread", "--late-s", late_s, ranks=2, torchrun=("--max-restarts=3",), fresh=True)
    assert found.code != 0
    assert 1 <= found.err.count("ConfigError: threads were started before dtrain.launch") <= 2, "once a rank"


@pytest.mark.parametrize(("step", "commit"), [(0, []), (3, [2])])
def test_an_exception_at_the_same_place_stops_after_three_generations(
    tmp_path: Path, step: int, commit: list[int]
) -> None:
    found = run(tmp_path, "--fail-at", step, fresh=step == 3)
    assert found.code == 1
    assert found.err.count(PLANTED.format(step, 0) + "; starting it again") == (3 if step else 2)
    assert (
        f"stopped: no new step in 3 generations; the last time rank 0 failed: {PLANTED.format(step, 0)}"
        + (" (in step 3)" if step else "")
    ) in found.said
    assert found.err.count("Traceback (most recent call last)") <= 2
    assert "in fail\n    raise ArithmeticError" in found.err, "the user's own line"
    assert commits(tmp_path) == commit
    assert not (tmp_path / "came-back").exists()


def test_of_several_ranks_the_first_to_fail_is_named_and_its_victims_are_not(tmp_path: Path) -> None:
    found = run(tmp_path, "--global-batch", 12, "--fail-at", 3, "--fail-rank", 1, ranks=3)
    assert found.code == 1
    assert {event["rank"] for event in events(tmp_path, "failed")} == {1}
    assert (
        f"stopped: no new step in 3 generations; the last time rank 1 failed: {PLANTED.format(3, 1)} (in step 3)"
        in (found.said)
    )
    ours = found.err.partition("torch.distributed.elastic.multiprocessing.errors")[0]
    assert not re.search(r"rank [02] failed", ours), ours
    assert "Connection" not in "".join(line for line in found.said), "a victim's error"


def test_a_run_that_torchrun_starts_again_does_not_fail_three_times_more(tmp_path: Path) -> None:
    found = run(tmp_path, "--fail-at", 3, ranks=2, torchrun=("--max-restarts=2",))
    assert found.code == 1
    assert len(events(tmp_path, "failed")) <= 4, "the generations of the first start alone"
    why = f"no new step in 3 generations; the last time rank 0 failed: {PLANTED.format(3, 0)} (in step 3)"
    assert found.said.count(f"stopped: {why}") == 1
    assert found.said.count(f"stopped before: {why}") <= 1, "torchrun is told not to start it again"


def test_sys_exit_in_main_is_a_failure_that_names_its_code(tmp_path: Path) -> None:
    found = run(tmp_path, "--exit-at", 0)
    assert found.code == 1
    assert "stopped: no new step in 3 generations; the last time rank 0 failed: exited with 7" in found.said


def test_in_place_the_users_own_exception_leaves_launch_in_the_same_process(tmp_path: Path) -> None:
    config = dtrain.Config(dir=str(tmp_path), global_batch=2, micro_batch=1)
    seen = tmp_path / "seen"

    def main(run: dtrain.Run) -> None:
        raise LookupError(f"in process {torch.multiprocessing.current_process().pid}")

    def work() -> int:
        import os

        try:
            dtrain.launch(main, config, in_place=True)
        except LookupError as error:
            seen.write_text(f"{error} and {os.getpid()} {traceback.format_exc()}")
        return 0

    child = fork(work)
    pid = child.pid
    assert child.wait() == 0
    assert seen.read_text().startswith(f"in process {pid} and {pid} ")
    assert "in main\n" in seen.read_text()


@pytest.mark.parametrize("ranks", [0, 2])
def test_ctrl_c_once_finishes_the_step_and_saves_it(tmp_path: Path, ranks: int) -> None:
    with started(tmp_path, "--steps", 1000, "--step-s", 0.1, "--save-every", 1000, ranks=ranks, fresh=True) as program:
        program.wait_for(lambda: "step 3 " in program.out())
        program.interrupt()
        found = program.end()
    steps = [int(line.split()[1]) for line in found.out.splitlines() if line.startswith("step ")]
    last = max([3, *steps])
    assert found.code == (130 if ranks == 0 else 1), found.err
    assert commits(tmp_path) == [last], "every step that was done is saved"
    assert "stopping after this step, with a checkpoint; Ctrl-C again stops at once" in found.said
    again = run(tmp_path, "--steps", last + 1)
    assert again.code == 0, again.err
    assert again.out.startswith(f"step {last + 1} "), "and it goes on from there"


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    with started(tmp_path, "--steps", 1000, "--step-s", 30, "--save-every", 1000, fresh=True) as program:
        program.wait_for(lambda: events(tmp_path, "started"))
        program.interrupt()
        program.wait_for(lambda: "Ctrl-C again stops at once" in program.err())
        program.interrupt()
        found = program.end()
    assert found.code == 130
    assert found.seconds < 5
    assert commits(tmp_path) == []


def test_a_run_that_is_done_says_nothing_wrong_and_returns(tmp_path: Path) -> None:
    found = run(tmp_path, "--steps", 3, ranks=2)
    assert (found.code, commits(tmp_path)) == (0, [2, 3])
    assert (tmp_path / "came-back").exists()
    assert found.said == [f"{tmp_path}: nothing saved yet, 2 ranks", "finished: step 3 of 3, saved"]
    kept = json.loads((tmp_path / "config.json").read_bytes())
    assert len(kept.pop("run")) == 32, "what tells it from any other run"
    options = {"global_batch": 8, "micro_batch": 4, "seed": 0}
    assert kept == options | {"precision": "fp32", "reduction": "fast", "tf32": False}
