"""The commit log: one winner for each number, and nothing from a process whose time is over."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dtrain.checkpoint.catalog import CHECKPOINTS, Catalog
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.policy import Keep
from dtrain.elastic.process import Child, fork
from dtrain.errors import Fenced
from dtrain.observe.events import Events
from dtrain.storage.local import LocalStorage

RACERS = 16
ROUNDS = 60


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def claimed(storage: LocalStorage) -> Log:
    log = Log(storage)
    log.claim(time.time(), "")
    return log


def entry(log: Log, kind: Any = "commit", step: int = 1, attempt: str = "a", **fields: Any) -> Entry:
    return Entry(kind=kind, epoch=log.epoch, time=time.time(), step=step, attempt=attempt, **fields)


def files(storage: LocalStorage) -> dict[str, bytes]:
    """All that lies in the log's folder, hidden files too."""
    return {path.name: path.read_bytes() for path in (Path(storage.root) / FOLDER).iterdir()}


def processes(count: int, work: Callable[[int], int]) -> list[Child]:
    return [fork(partial(work, number)) for number in range(count)]


def test_of_sixteen_processes_that_create_one_name_exactly_one_succeeds_in_every_round(storage: LocalStorage) -> None:
    won = Path(storage.root) / "won"
    won.mkdir()
    gate = time.monotonic() + 0.5

    def race(number: int) -> int:
        for turn in range(ROUNDS):
            while time.monotonic() < gate + 0.02 * turn:  # all of them at the same moment
                pass
            try:
                storage.create(f"log/{turn:08d}.json", f"{number} {turn}".encode() * 1000)
            except FileExistsError:
                continue
            (won / f"{turn}-{number}").touch()
        return 0

    assert [child.wait() for child in processes(RACERS, race)] == [0] * RACERS
    winners = sorted(map(int, (name.name.partition("-")[0] for name in won.iterdir())))
    assert winners == list(range(ROUNDS))
    for turn in range(ROUNDS):
        (winner,) = (name.name.partition("-")[2] for name in won.glob(f"{turn}-*"))
        assert storage.read(f"log/{turn:08d}.json") == f"{winner} {turn}".encode() * 1000
    assert len(files(storage)) == ROUNDS, "a loser left something behind"


def test_claims_that_race_all_get_an_epoch_of_their_own(storage: LocalStorage) -> None:
    def race(number: int) -> int:
        for turn in range(5):
            Log(storage).claim(time.time(), f"{number}-{turn}")
        return 0

    assert [child.wait() for child in processes(RACERS, race)] == [0] * RACERS
    log = Log(storage)
    log.refresh()
    assert [e.epoch for e in log.entries] == list(range(1, 5 * RACERS + 1))
    assert len({e.nonce for e in log.entries}) == 5 * RACERS
    assert log.broken == []


def test_a_leftover_that_slept_in_front_of_its_append_is_fenced_and_adds_nothing(storage: LocalStorage) -> None:
    said = Path(storage.root) / "said"

    def leftover() -> int:
        log = claimed(storage)
        log.append(entry(log, attempt="first"))
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            log.append(entry(log, step=2, attempt="late"))
        except Fenced as error:
            said.write_text(str(error))
            return 7
        return 0

    child = fork(leftover)
    _wait_until_stopped(child.pid)
    newer = claimed(storage)
    before = files(storage)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait() == 7
    assert said.read_text() == (
        f"{storage.root}: epoch 2 took over; epoch 1 is a leftover and stops without writing any more"
    )
    assert files(storage) == before
    newer.append(entry(newer, step=2, attempt="ours"))
    assert [e.attempt for e in newer.commits()] == ["first", "ours"]


def test_a_leftover_that_slept_between_its_look_and_its_link_loses_the_number(storage: LocalStorage) -> None:
    def leftover() -> int:
        log = claimed(storage)
        create = storage.create

        def late(path: str, data: bytes) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)  # the log has been read, the number isn't taken yet
            create(path, data)

        storage.create = late  # type: ignore[method-assign]
        try:
            log.append(entry(log, attempt="late"))
        except Fenced:
            return 7
        return 0

    child = fork(leftover)
    _wait_until_stopped(child.pid)
    newer = claimed(storage)
    os.kill(child.pid, signal.SIGCONT)
    assert child.wait() == 7
    newer.refresh()
    assert [(e.kind, e.epoch) for e in newer.entries] == [("claim", 1), ("claim", 2)]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="half written"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data.replace(b'"step": 1', b'"step": 3'), id="another step"),
        pytest.param(lambda data: data.replace(b'"kind": "commit"', b'"kind": "retire"'), id="another kind"),
        pytest.param(lambda data: b"[]", id="another document"),
        pytest.param(lambda data: b"\xff" * 40, id="no text"),
    ],
)
def test_a_broken_entry_is_named_and_passed_over(storage: LocalStorage, spoil: Callable[[bytes], bytes]) -> None:
    log = claimed(storage)
    for step in (1, 2):
        log.append(entry(log, step=step, attempt=f"of step {step}"))
    path = Path(storage.root) / FOLDER / "00000001.json"
    path.write_bytes(spoil(path.read_bytes()))
    reader = Log(storage)
    reader.refresh()
    assert [e.attempt for e in reader.commits()] == ["of step 2"]
    (broken,) = reader.broken
    assert broken.startswith("log/00000001.json: no log entry (")
    assert reader.claim(time.time(), "").number == 3, "the number of a broken entry is not used again"


def test_no_flipped_bit_in_an_entry_goes_unnoticed_by_what_it_says(storage: LocalStorage) -> None:
    log = claimed(storage)
    written = log.append(entry(log, step=41, attempt="step-41.e1.00", manifest="0123456789abcdef", nonce="n"))
    path = Path(storage.root) / FOLDER / "00000001.json"
    whole = path.read_bytes()
    passed = 0
    for position in range(len(whole)):
        for bit in (position % 8, (position + 3) % 8):
            spoiled = bytearray(whole)
            spoiled[position] ^= 1 << bit
            path.write_bytes(spoiled)
            reader = Log(storage)
            reader.refresh()
            if reader.broken:
                assert len(reader.entries) == 1
            else:  # white space between the fields, or another spelling of the same number
                passed += 1
                assert reader.entries[1] == written
    assert passed < len(whole) // 10, "hardly any bit says nothing"


def test_a_broken_entry_that_a_live_writer_comes_upon_fences_it(storage: LocalStorage) -> None:
    log = claimed(storage)
    storage.create("log/00000001.json", b"it may have been a claim")
    before = files(storage)
    with pytest.raises(Fenced, match=r"can't read log/00000001\.json"):
        log.append(entry(log))
    with pytest.raises(Fenced, match=r"can't read log/00000001\.json"):
        log.append(entry(log))  # and for good
    assert files(storage) == before
    # One that was there at the claim doesn't: the claim stands behind it.
    newer = claimed(storage)
    assert newer.append(entry(newer)).number == 3


def test_commits_are_those_that_are_neither_bad_nor_retired_in_order(storage: LocalStorage) -> None:
    log = claimed(storage)
    for step in range(1, 6):
        log.append(entry(log, step=step, attempt=f"a{step}"))
    log.append(entry(log, "bad", 2, "a2", reason="a bit"))
    log.append(entry(log, "bad", 3, "a3", reason="a byte"))
    log.append(entry(log, "retire", 1, "a1"))
    log.append(entry(log, "retire", 3, "a3"))
    for seen in (log, claimed(storage)):
        assert [e.step for e in seen.commits()] == [4, 5]
        assert [(e.step, e.reason) for e in seen.bad()] == [(2, "a bit")]
    newer = claimed(storage)
    newer.append(entry(newer, "good", 2, "a2"))
    newer.append(entry(newer, "good", 3, "a3"))
    assert [e.step for e in newer.commits()] == [2, 4, 5]
    assert (newer.bad(), newer.found_bad()) == ([], [])
    newer.append(entry(newer, "bad", 2, "a2", reason="another bit"))
    assert [e.step for e in newer.commits()] == [4, 5]
    assert [(e.step, e.reason) for e in newer.bad()] == [(2, "another bit")]


def test_a_step_that_is_committed_again_counts_as_the_newest(storage: LocalStorage) -> None:
    log = claimed(storage)
    for step, attempt in ((10, "a"), (20, "b"), (10, "c")):
        log.append(entry(log, step=step, attempt=attempt))
    log.append(entry(log, "bad", 10, "a"))
    assert [(e.step, e.attempt) for e in log.commits()] == [(20, "b"), (10, "c")]


def test_an_entry_is_read_back_as_it_was_written(storage: LocalStorage) -> None:
    log = claimed(storage)
    written = log.append(entry(log, "bad", 7, "step-7.e1.ab", nonce="ünï", reason='a "quote"\n', manifest="00"))
    reader = Log(storage)
    assert reader.refresh()[-1] == written
    assert reader.refresh() == []
    assert json.loads(storage.read("log/00000001.json"))["entry"]["reason"] == 'a "quote"\n'


def test_a_reader_never_sees_an_entry_in_part(storage: LocalStorage) -> None:
    """Several processes append long entries while another reads: no entry is ever broken, and none changes."""
    until = time.monotonic() + 1.5

    def write(number: int) -> int:
        while time.monotonic() < until:
            log = claimed(storage)
            try:
                log.append(entry(log, attempt="x" * 200_000, nonce=str(number)))
            except Fenced:
                continue
        return 0

    writers = processes(3, write)
    seen: dict[int, Entry] = {}
    while time.monotonic() < until:
        reader = Log(storage)
        reader.refresh()
        assert reader.broken == []
        for found in reader.entries[-20:]:
            assert seen.setdefault(found.number, found) == found
    assert [child.wait() for child in writers] == [0] * 3
    assert sum(e.kind == "commit" for e in seen.values()) > 3


def test_a_process_killed_in_the_middle_of_an_append_leaves_no_entry_in_part(storage: LocalStorage) -> None:
    for turn in range(15):
        claimed_it = Path(storage.root) / f"claimed-{turn}"

        def write(marker: Path = claimed_it) -> int:
            log = claimed(storage)
            marker.touch()
            while True:
                log.append(entry(log, attempt="x" * 300_000))

        child = fork(write)
        while not claimed_it.exists():
            time.sleep(0.001)
        time.sleep(0.01 + 0.003 * turn)
        assert child.kill() == -signal.SIGKILL
    reader = Log(storage)
    reader.refresh()
    assert reader.broken == []
    assert sum(e.kind == "commit" for e in reader.entries) > 15
    assert reader.epoch == 15


def test_a_claim_of_its_own_whose_answer_got_lost_fences_nobody_out(storage: LocalStorage) -> None:
    first = Log(storage).claim(time.time(), "ours")
    Log(storage).claim(time.time(), "ours")  # nobody was told of it
    assert Log(storage).claim(time.time(), "ours", after=first.epoch).epoch == 3
    Log(storage).claim(time.time(), "theirs")
    with pytest.raises(Fenced):
        Log(storage).claim(time.time(), "ours", after=3)


def test_a_claim_that_a_listing_has_left_out_fences_all_the_same(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = claimed(storage)
    newer = claimed(storage)
    committed = newer.append(entry(newer))
    listed = storage.names
    with monkeypatch.context() as patch:
        patch.setattr(storage, "names", lambda *a, **k: [n for n in listed(*a, **k) if n != "00000001.json"])
        for _ in range(2):
            with pytest.raises(Fenced, match="epoch 2 took over"):
                leftover.append(entry(leftover))
    assert Log(storage).refresh()[-1] == committed


def test_a_claim_that_can_not_be_read_gives_its_epoch_to_no_two(storage: LocalStorage) -> None:
    claimed(storage)
    ours = Log(storage)
    place = ours.claim(time.time(), "ours").number
    (Path(storage.root) / FOLDER / f"{place:08d}.json").write_text("{")
    theirs = Log(storage)
    assert theirs.claim(time.time(), "theirs").epoch == 2
    with pytest.raises(Fenced):
        ours.append(entry(ours))
    theirs.append(entry(theirs))


def test_an_entry_in_the_place_of_another_is_none(storage: LocalStorage) -> None:
    log = claimed(storage)
    first, second = (log.append(entry(log, step=step)) for step in (1, 2))
    paths = [Path(storage.root) / FOLDER / f"{each.number:08d}.json" for each in (first, second)]
    data = [path.read_bytes() for path in paths]
    paths[0].write_bytes(data[1])
    reader = Log(storage)
    assert reader.refresh()[1:] == [second]
    assert [line.partition(": ")[0] for line in reader.broken] == [f"{FOLDER}/{first.number:08d}.json"]
    document = json.loads(data[0])  # as it was before there was a number in it
    fields = document["entry"]
    old = {"entry": fields, "digest": xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())}
    paths[0].write_text(json.dumps(old, indent=1))
    assert Log(storage).refresh()[1:] == [first, second]


def test_a_commit_that_a_listing_has_left_out_is_kept_by_who_claims_after_it(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(storage, Keep(last=2), Events(storage.root))
    catalog.claim()
    attempt = catalog.new_attempt(1)
    with storage.open_new(f"{CHECKPOINTS}/{attempt}/file") as sink:
        sink.write(b"bytes")
    catalog.commit(attempt, step=1, manifest="", bytes=5, world_size=1)
    (kept,) = catalog.log.commits()
    catalog.log.append(entry(catalog.log))
    listed = storage.names
    with monkeypatch.context() as patch:
        patch.setattr(storage, "names", lambda *a, **k: [n for n in listed(*a, **k) if n != f"{kept.number:08d}.json"])
        other = Catalog(storage, Keep(last=2), Events(storage.root))
        other.claim()
    assert kept in other.log.commits()
    assert storage.names(f"{CHECKPOINTS}/{attempt}") == ["file"]


def test_what_can_not_be_cleared_away_does_not_hold_up_a_claim(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(storage, Keep(last=2), Events(storage.root))
    catalog.claim()

    def broken(*_: object) -> list[str]:
        raise OSError("the network is gone")

    other = Catalog(storage, Keep(last=2), Events(storage.root))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "half_made", broken)
        other.claim()
    assert other.epoch == 2
    other.new_attempt(1)
    with pytest.raises(Fenced):
        catalog.new_attempt(1)


def test_a_claim_deletes_old_halves_and_leaves_those_of_the_living(storage: LocalStorage) -> None:
    log = claimed(storage)
    folder = Path(storage.root) / FOLDER
    old, young = folder / ".00000009.json.aa.half", folder / ".00000009.json.bb.half"
    for half in (old, young):
        half.write_bytes(b"half of an ent")
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    os.utime(folder / "00000000.json", (hour_ago, hour_ago))
    log.refresh()
    assert (log.broken, len(log.entries)) == ([], 1), "a half is no entry"
    Catalog(storage, Keep(last=2), Events(storage.root)).claim()
    assert set(files(storage)) == {"00000000.json", "00000001.json", young.name}


def test_an_export_that_was_killed_in_the_run_folder_is_cleared_away_and_hides_nothing(storage: LocalStorage) -> None:
    claimed(storage)
    hour_ago = time.time() - 3600
    half, attempt = (
        Path(storage.root) / ".weights.aa.half",
        Path(storage.root) / "checkpoints" / "step-00000003.e1.0123abcd",
    )
    for folder in (half, attempt):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"half")
    (left,) = storage.half_made()
    assert (left.path, left.bytes > 4, left.changed > hour_ago) == (half.name, True, True)
    for path in (half / "file", half):
        os.utime(path, (hour_ago, hour_ago))
    Catalog(storage, Keep(last=2), Events(storage.root)).claim()
    assert not half.exists()
    assert not attempt.exists()


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the process never stopped itself"
        time.sleep(0.005)
