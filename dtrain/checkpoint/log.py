"""The commit log: the only authority on which checkpoints a run has.

    <run>/log/00000042.json         created exclusively, never changed

Creating the next number is a compare-and-swap: who succeeds has seen every entry before it. So a claim that stands in
the log is seen by every writer after it, and a leftover of an earlier generation can't add to the log any more.

An entry is one of
    claim   a new generation takes the run over, under the next epoch
    commit  a checkpoint is whole and durable: step, attempt, digest of its manifest
    bad     a committed checkpoint failed its check
    good    one that had failed it was restored whole: what couldn't be read then is back
    retire  a committed checkpoint is about to be deleted
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import xxhash

from dtrain.errors import Damaged, Fenced
from dtrain.storage.base import Distant, Storage, looks

FOLDER = "log"
_MOST_LEFT_OUT = 1000
"""Entries that may have been added while a listing was made. A larger gap is none of that kind."""
Kind = Literal["claim", "commit", "bad", "good", "retire"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the run's history."""

    kind: Kind
    epoch: int
    """Of the generation that wrote the entry."""
    time: float
    """Unix time in seconds; for people, nothing is decided by it."""
    nonce: str = ""
    """Tells apart the writers of equal entries."""
    step: int = 0
    attempt: str = ""
    """The checkpoint's folder, below `checkpoints/`."""
    manifest: str = ""
    """Digest of the checkpoint's manifest."""
    bytes: int = 0
    """Of all of a commit's files together."""
    world_size: int = 0
    """Of the ranks that wrote it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the state was measured to be worth, where it was measured."""
    reason: str = ""
    group: int = 0
    """In the log of a local folder beside a bucket: the epoch of these savers in the bucket's log."""
    number: int = -1
    """The entry's place in the log; not part of the file, but its name."""


class Log:
    """A view of the log that grows with it. Not for several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._next = 0
        self._claim = self._last_broken = -1
        self._epoch = 0
        self._nonce = ""
        self.entries: list[Entry] = []
        self.broken: list[str] = []
        """Files in the log that can't be read, named; they are passed over."""

    def refresh(self) -> list[Entry]:
        """Read what has been added since, and return it."""
        before = len(self.entries)
        names = self._storage.names(FOLDER, after=f"{self._next - 1:08d}.json" if self._next else "")
        numbers = [int(name.removesuffix(".json")) for name in names if is_entry(name)]
        numbers = [number for number in numbers if number >= self._next]
        if numbers and numbers[-1] - self._next < len(numbers) + _MOST_LEFT_OUT:
            # A listing may leave out a name that came while it was made, and give one behind it.
            numbers = list(range(self._next, numbers[-1] + 1))
        at_once = self._storage.reads_at_once if isinstance(self._storage, Distant) else 1
        with ThreadPoolExecutor(at_once) as pool:
            found = list(
                pool.map(self._read, numbers) if len(numbers) > 1 and at_once > 1 else map(self._read, numbers)
            )
        for number, entry in zip(numbers, found, strict=True):
            self._next = number + 1
            if isinstance(entry, Entry):
                self.entries.append(entry)
            else:
                self.broken.append(entry)
                self._last_broken = number
        return self.entries[before:]

    def _read(self, number: int) -> Entry | str:
        """An entry, or what is the matter with it."""
        name, found = f"{FOLDER}/{number:08d}.json", ""
        for _ in looks(self._storage):
            try:
                return _decode(self._storage.read(name), number)
            except FileNotFoundError:
                found = f"{name}: missing"
            except (Damaged, IsADirectoryError) as error:
                found = f"{name}: {error}"
        return found

    @property
    def epoch(self) -> int:
        """The newest epoch that was claimed; 0 in a new run."""
        return max((entry.epoch for entry in self.entries), default=0)

    def first_epoch(self, epoch: int) -> int:
        """The first that was claimed by who has claimed this one."""
        claims = {entry.epoch: entry.nonce for entry in self.entries if entry.kind == "claim"}
        return min((e for e, nonce in claims.items() if nonce == claims.get(epoch)), default=epoch)

    def claim(self, time: float, nonce: str, *, after: int | None = None) -> Entry:
        """Take the run over: from now on, no earlier generation can add to the log.

        :param nonce: who claims. Another claim of its own, one whose answer got lost say, is no hindrance.
        :param after: the epoch that has to be the newest one still; None takes the run over from any.
        :raises Fenced: it is no more.
        """
        while True:
            self.refresh()
            newest = next((entry for entry in reversed(self.entries) if entry.kind == "claim"), None)
            if after is not None and self.epoch != after and newest is not None and newest.nonce != nonce:
                raise Fenced(
                    f"{self._storage.root}: epoch {self.epoch} took over; epoch {after} is a leftover and stops "
                    "without writing any more"
                )
            entry = self._create(Entry(kind="claim", epoch=self.epoch + 1, time=time, nonce=nonce))
            if entry is not None:
                self._claim, self._epoch, self._nonce = entry.number, entry.epoch, nonce
                return entry

    def append(self, entry: Entry) -> Entry:
        """Add an entry under the epoch that this log claimed.

        :raises Fenced: a newer generation has claimed the run, or the log holds something that can't be read.
        """
        while True:
            self.check()
            created = self._create(entry)
            if created is not None:
                return created

    def check(self) -> None:
        """:raises Fenced: a newer generation has claimed the run, or the log holds something that can't be read."""
        self.refresh()
        newer = [entry for entry in self.entries if entry.epoch > self._epoch or self._is_after_ours(entry)]
        if newer or self._last_broken > self._claim:  # which may be a claim
            what = f"epoch {newer[-1].epoch} took over" if newer else f"can't read {self.broken[-1]}"
            raise Fenced(
                f"{self._storage.root}: {what}; epoch {self._epoch} is a leftover and stops without writing any more"
            )

    def _is_after_ours(self, entry: Entry) -> bool:
        """Whether it is somebody else's claim of the same epoch, who couldn't read ours."""
        return entry.kind == "claim" and entry.number > self._claim and entry.nonce != self._nonce

    def commits(self) -> list[Entry]:
        """The commits that were neither found bad nor retired, oldest first, in the order of the log."""
        gone = self._retired() | {entry.attempt for entry in self.bad()}
        return [entry for entry in self.entries if entry.kind == "commit" and entry.attempt not in gone]

    def bad(self) -> list[Entry]:
        """Of the commits that failed their check and still lie there, what was said of each at last."""
        judged = {entry.attempt: entry for entry in self.entries if entry.kind in ("bad", "good")}
        retired = self._retired()
        return [entry for entry in judged.values() if entry.kind == "bad" and entry.attempt not in retired]

    def found_bad(self) -> list[Entry]:
        """Their commits, oldest first."""
        attempts = {entry.attempt for entry in self.bad()}
        return [entry for entry in self.entries if entry.kind == "commit" and entry.attempt in attempts]

    def _retired(self) -> set[str]:
        return {entry.attempt for entry in self.entries if entry.kind == "retire"}

    def _create(self, entry: Entry) -> Entry | None:
        """Try to be the next; None if somebody else was."""
        entry = replace(entry, number=self._next)
        try:
            self._storage.create(f"{FOLDER}/{entry.number:08d}.json", _encode(entry))
        except FileExistsError:
            return None
        self._next += 1
        self.entries.append(entry)
        return entry


def is_entry(name: str) -> bool:
    """Whether a file in the log's folder is one of its entries."""
    return re.fullmatch(r"\d{8,}\.json", name) is not None


def _encode(entry: Entry) -> bytes:
    fields = {key: value for key, value in asdict(entry).items() if key != "number"}
    return json.dumps({"entry": fields, "digest": _digest(asdict(entry)), "number": entry.number}, indent=1).encode()


def _decode(data: bytes, number: int) -> Entry:
    try:
        document = json.loads(data)
        fields = document["entry"]
        place = {"number": document["number"]} if "number" in document else {}  # there was none at first
        if document["digest"] != _digest(fields | place):
            raise ValueError("its digest doesn't match")
        if place.get("number", number) != number:
            raise ValueError(f"it is that of number {place['number']}")
        return Entry(**fields, number=number)
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"no log entry ({error})") from error


def _digest(fields: dict[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())
