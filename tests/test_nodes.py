"""Nodes that die, are cut off, stall and come back: the run goes on with what is there, and ends with the same bits.

More of them, in other orders: `python -m tests.faults_nodes`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.nodes import DELAY_S
from dtrain.errors import ConfigError
from tests.cluster import STEPS, assert_ended_as, cluster, disturb, undisturbed_in

FEW = 50


def test_nodes_that_die_or_are_cut_off_are_left_behind_and_taken_in_again(tmp_path: Path) -> None:
    """The first node dies and comes back; then another is cut off, with its processes alive, and is healed."""
    with cluster(tmp_path, least=2, most=3) as job:
        disturb(job, "kill", 0)
        if job.nodes.apart:
            name = job.hosts()[2]
            disturb(job, "cut", 2)
            assert f"this node ({name}) was given up by the others, and asks torchrun to take it in again" in job.said()
        assert "has not been heard of for 3 s: torchrun is to form the group anew" in job.said()
        assert_ended_as(job, undisturbed_in(tmp_path / "undisturbed", STEPS))


def test_what_is_left_of_two_nodes_goes_on_alone_from_the_snapshots_of_both(tmp_path: Path) -> None:
    memory: dict[str, Any] = {"save_every": 1000, "snapshot_every": 1, "replicate_snapshots": 1}
    with cluster(tmp_path, least=1, most=2, count=2, steps=FEW, **memory) as job:
        killed_at = job.step()
        job.nodes.kill(job.node_of(1))
        job.until_it_trains_on(1)
        (restored,) = job.events("restored")
        assert restored["place"] == "memory"
        assert int(str(restored["step"])) >= killed_at - 2, "of what was done, one step at most is done again"
        assert_ended_as(job, undisturbed_in(tmp_path / "undisturbed", FEW))


def test_a_spare_steps_in_for_a_node_that_dies_and_has_its_snapshots_from_another(tmp_path: Path) -> None:
    """Nothing was ever saved: what the first node's rank had of the state lies in the other one's memory."""
    memory: dict[str, Any] = {"save_every": 1000, "snapshot_every": 1, "replicate_snapshots": 1}
    with cluster(tmp_path, least=2, most=2, steps=FEW, parallel="fsdp", **memory) as job:
        before = set(job.hosts().values())
        killed_at = job.step()
        job.nodes.kill(job.node_of(0))
        job.until_it_trains_on(2)
        assert len(set(job.hosts().values()) - before) == 1 or not job.nodes.apart
        (restored,) = job.events("restored")
        assert restored["place"] == "memory"
        assert int(str(restored["step"])) >= killed_at - 2, "of what was done, one step at most is done again"
        assert_ended_as(job, undisturbed_in(tmp_path / "undisturbed", FEW))


def test_a_node_whose_network_is_slow_is_no_loss(tmp_path: Path) -> None:
    """What goes to it and what comes from it takes a while, but less than its beat may be late."""
    with cluster(tmp_path, least=2, most=3, steps=FEW) as job:
        if not job.nodes.apart:
            with pytest.raises(ConfigError, match=r"nodes on 127\.0\.0\.1 have no network of their own"):
                job.nodes.delay(1)
            return
        began = len(job.events("started"))
        job.nodes.delay(job.node_of(1))
        begun = time.monotonic()
        job.until_new_steps(2)
        assert time.monotonic() - begun > 2 * 2 * DELAY_S, "a step takes a message there and one back, or more"
        time.sleep(max(0.0, begun + 10 - time.monotonic()))  # beats and keep-alives come this way as well
        job.nodes.heal(job.node_of(1))
        job.until_new_steps()
        assert len(job.events("started")) == began, "nobody was started again"
        assert job.events("lost") == job.events("failed") == []
        assert_ended_as(job, undisturbed_in(tmp_path / "undisturbed", FEW))
