"""`dtrain nodes` and `dtrain store`, as a user types them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.cli.nodes import Nodes, agent
from tests.jobs import ROOT
from tests.saving import commits

DTRAIN = (sys.executable, "-m", "dtrain.cli.main")
ENV = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_launcher_and_the_nodes_have_the_same_settings() -> None:
    nodes = Nodes(1)
    nodes.__exit__()
    command = agent(nodes, 0, [], least=1, most=1)
    launcher = (ROOT / "launch" / "node.sh").read_text()
    (settings,) = re.findall(r'^rendezvous="(.*)"$', launcher, re.MULTILINE)
    assert settings == command[command.index("--rdzv-conf") + 1]


def test_a_script_is_trained_on_nodes_that_are_killed_and_started_again_by_hand(tmp_path: Path) -> None:
    script = [str(ROOT / "tests" / "small_job.py"), str(tmp_path / "run"), "--steps", "60", "--step-s", "0.2"]
    command = [*DTRAIN, "nodes", "--count", "2", "--nodes", "1:2", "--", *script]
    output = tmp_path / "output.txt"

    def until(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in output.read_text():
            assert program.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)

    with (
        output.open("wb") as file,
        subprocess.Popen(command, env=ENV, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True) as program,
    ):
        try:
            assert program.stdin is not None
            until("2 ranks")
            until("step 5 ")
            program.stdin.write("fly 1\nkill 1\nkill 1\n")
            program.stdin.flush()
            until("restored step")
            until("1 rank")
            assert program.wait(60) == 0, output.read_text()
        finally:
            program.terminate()
    assert commits(tmp_path / "run")[-1] == 60
    said = output.read_text()
    assert "[nodes] 'fly 1': try kill, start, cut, delay, heal, freeze, thaw with a number, or quit" in said
    assert "[nodes] kill 1: node 1 doesn't run" in said
    assert "[nodes] kill 1: done" in said


def test_ctrl_c_says_what_becomes_of_the_nodes(tmp_path: Path) -> None:
    script = [str(ROOT / "tests" / "small_job.py"), str(tmp_path / "run"), "--steps", "1000", "--step-s", "0.2"]
    with subprocess.Popen(
        [*DTRAIN, "nodes", "--count", "1", "--nodes", "1:1", "--", *script],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has background jobs ignore it, and what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as program:
        assert program.stderr is not None
        assert any("type kill" in line for line in program.stderr)
        program.send_signal(signal.SIGINT)
        assert "[nodes] Ctrl-C: the power of all nodes fails, nothing is saved" in program.stderr.read()
        assert program.wait(60) == 130


def test_the_launcher_says_where_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and doesn't listen
        store = f"127.0.0.1:{free.getsockname()[1]}"
        env = ENV | {"STORE": store, "NODES": "1:1"}
        command = ["bash", str(ROOT / "launch" / "node.sh"), "train.py"]
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as program:
            assert program.stderr is not None
            said = program.stderr.readline()
            program.kill()
    assert said.startswith(f"node.sh: nobody answers at STORE={store} yet: start 'dtrain store' there")


def test_a_script_is_needed(tmp_path: Path) -> None:
    found = subprocess.run([*DTRAIN, "nodes"], env=ENV, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "there is no script to run: dtrain nodes -- train.py" in found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "0"), "count=0, nproc=1: give 1 or more, and at most 253 nodes"),
        (("--count", "254"), "count=254, nproc=1: give 1 or more, and at most 253 nodes"),
        (("--nodes", "4:4"), "nodes='4:4': 3 nodes are made, and can't be as many as are needed"),
    ],
)
def test_numbers_of_nodes_that_can_not_be_are_refused(options: tuple[str, ...], message: str) -> None:
    found = subprocess.run(
        [*DTRAIN, "nodes", *options, "--", "train.py"], env=ENV, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert message in " ".join(found.stderr.split())


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = subprocess.run(
            [*DTRAIN, "store", "--port", str(port)], env=ENV, capture_output=True, text=True, check=False, timeout=60
        )
    assert found.returncode == 2
    assert f"dtrain: error: port={port} can't be listened on: " in found.stderr
