"""`Catalog`: the checkpoints of a run folder, as the one process sees them that may write there.

It claims the run, gives attempts their names, commits them, marks bad ones, and deletes. It knows log and folders, and
no tensors; the ranks' agreement comes before (see `saver`).
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from dtrain.checkpoint.format import MANIFEST
from dtrain.checkpoint.index import Indexes
from dtrain.checkpoint.log import FOLDER, Entry, Log
from dtrain.checkpoint.policy import Keep, to_retire
from dtrain.checkpoint.reader import read_manifest
from dtrain.errors import Damaged, NoGoodCheckpoint
from dtrain.observe.events import Events
from dtrain.storage.base import Distant, Storage

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
"""What a run leaves in its folder before all else: the options that its results depend on."""
ABANDONED_S = 600.0
"""What is half-made and of this age belongs to a process that is gone."""


class Catalog:
    """See above. Not for several threads at once.

    :param keep: which checkpoints are kept.
    :ivar group: goes into each commit, see `Entry.group`.
    """

    def __init__(self, storage: Storage, keep: Keep, events: Events) -> None:
        self.storage = storage
        self.indexes = Indexes()
        self._keep = keep
        self._events = events
        self.log = Log(storage)
        self.epoch = 0
        """The epoch that was claimed; 0 before."""
        self.group = 0

    def claim(self, *, nonce: str = "", after: int | None = None) -> None:
        """Take the run over from any earlier generation. :param nonce: and `after`: see `Log.claim`.

        :raises NoGoodCheckpoint: there are checkpoints without a log that tells of them.
        """
        check_not_lost(self.storage, self.log)
        self.epoch = self.log.claim(time.time(), nonce or uuid.uuid4().hex[:8], after=after).epoch
        try:
            self._clear_away()
        except OSError as error:
            self._events.warn(f"{self.storage.root}: what is left over can't be deleted now: {error}")

    def _clear_away(self) -> None:
        """What earlier generations left unfinished."""
        for broken in self.log.broken:
            self._events.warn(f"{self.storage.root}/{broken}: passed over")
        whole = {entry.attempt for entry in (*self.log.commits(), *self.log.bad())}
        for name in self.storage.names(CHECKPOINTS):
            # Only attempts of earlier epochs: they can't be committed any more. A newer one isn't ours to judge.
            # And none at all while an entry can't be read, since that may be the commit of any of them.
            if name not in whole and 0 <= epoch_of(name) < self.epoch and not self.log.broken:
                self.discard(name)
        if not isinstance(self.storage, Distant):  # to look for them there takes long; `dtrain checkpoint gc` does
            for left in self.storage.half_made():
                if time.time() - left.changed > ABANDONED_S:
                    left.remove()

    def new_attempt(self, step: int) -> str:
        """A folder for one more try to save a step. :raises Fenced: a newer generation has taken the run over."""
        self.log.check()
        return f"step-{step:08d}.e{self.epoch}.{uuid.uuid4().hex[:8]}"

    def commit(self, attempt: str, **fields: Any) -> None:
        """Make an attempt that is whole and durable a checkpoint.

        :param fields: of the log's entry.
        :raises Fenced: a newer generation has taken the run over.
        """
        self._append("commit", attempt=attempt, group=self.group, **fields)

    def retire(self) -> list[str]:
        """Write off the checkpoints that needn't be kept any longer. :returns: their folders, to be deleted.

        :raises Fenced: a newer generation took over.
        """
        retired = []
        for entry in to_retire(self.log, self._keep, time.time()):
            self._append("retire", step=entry.step, attempt=entry.attempt)
            retired.append(entry.attempt)
        return retired

    def condemn(self, attempt: str, step: int, reason: str) -> None:
        """Mark a checkpoint as bad: it is passed over from now on. Who was told so before doesn't say it again."""
        if any(entry.attempt == attempt for entry in self.log.bad()):
            return
        self._append("bad", step=step, attempt=attempt, reason=reason)
        self._events.warn(f"checkpoint of step {step} is damaged and passed over: {reason}")

    def acquit(self, attempt: str, step: int) -> None:
        """Take back that a checkpoint is bad, as it was restored whole: from now on it counts like any other."""
        if not any(entry.attempt == attempt for entry in self.log.bad()):
            return
        self._append("good", step=step, attempt=attempt)
        self._events.warn(f"checkpoint of step {step} couldn't be read before, and is good: it counts again")

    def discard(self, attempt: str) -> None:
        """Delete an attempt's folder."""
        self.storage.remove(f"{CHECKPOINTS}/{attempt}")

    def _append(self, kind: Any, **fields: Any) -> None:
        self.log.append(Entry(kind=kind, epoch=self.epoch, time=time.time(), nonce=uuid.uuid4().hex[:8], **fields))


def check_not_lost(storage: Storage, log: Log) -> None:
    """:raises NoGoodCheckpoint: there is no log, and there was one: every attempt to save comes after a claim."""
    log.refresh()
    if log.entries or log.broken:
        return
    attempts = [name for name in storage.names(CHECKPOINTS) if epoch_of(name) >= 0]
    if attempts:
        raise NoGoodCheckpoint(
            f"{storage.root}/{CHECKPOINTS} holds {', '.join(attempts[:3])}{', ...' if attempts[3:] else ''}, and "
            f"{storage.root}/{FOLDER}, which tells what of it is whole, is empty or gone; bring it back, or start in "
            "another run folder"
        )


def candidates(
    storage: Storage,
    log: Log,
    condemn: Callable[[str, int, str], None],
    counts: Callable[[Entry], bool] = lambda commit: True,
) -> Iterator[tuple[Entry, bytes] | None]:
    """The commits whose manifest and sizes are right, newest first, with the manifest; None if there is none.

    Where no other is left, those that were found bad before are looked at once more: what couldn't be read may be back.

    :param condemn: called with attempt, step and reason for each of the others.
    :param counts: whether a commit counts at all.
    :raises NoGoodCheckpoint: there are commits, and none of them is good.
    """
    check_not_lost(storage, log)
    reasons = [f"step {entry.step}: {entry.reason}" for entry in log.entries if entry.kind == "bad"]
    ever = bool(reasons or log.broken)
    for commit in filter(counts, (*reversed(log.commits()), *reversed(list(log.found_bad())))):
        ever = True
        try:
            data, _ = read_manifest(storage, f"{CHECKPOINTS}/{commit.attempt}", MANIFEST, commit.manifest)
        except Damaged as error:
            condemn(commit.attempt, commit.step, str(error))
            reasons.append(f"step {commit.step}: {error}")
            continue
        yield commit, data
        reasons.append(f"step {commit.step}: damaged on some rank")
    if ever:
        log.refresh()
        known = {entry.step: entry.reason for entry in log.entries if entry.kind == "bad"}
        lines = [f"step {step}: {reason}" for step, reason in known.items()] or reasons
        raise NoGoodCheckpoint(
            f"{storage.root} has commits, but none of them can be read:\n  "
            + "\n  ".join(lines + log.broken)
            + "\nBring the files back, or start in another run folder."
        )
    yield None


def epoch_of(attempt: str) -> int:
    """The epoch in an attempt's name; -1 if it isn't one."""
    found = re.fullmatch(r"step-[0-9]{8,}\.e([0-9]+)\.[0-9a-f]{8}", attempt)
    return int(found[1]) if found else -1
