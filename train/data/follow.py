"""Trains from a store that is still being harvested. Its shards are read in segments; each segment is one pass.

The segments are cut beforehand, in the order of the shards' numbers, each with enough rows for one window of every
stream. So what a run reads depends neither on when it began nor on which shard is committed first: it ends with the
weights that the complete store gives. A segment is read once all its shards are committed; later passes read the whole
store. Each segment is recorded in the run's folder with the digest of what it held, before it is used.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError, Interrupted, UserError
from shared.files.base import WHOLE_BYTES, is_served
from shared.files.local import LocalFiles, read_whole
from shared.gate import BadData, integer, members, text
from shared.progress import say
from shared.store.commits import sealed, unsealed
from shared.store.opened import GrowingStore, Store
from train.data.loader import StorePass

SEGMENTS: Final = "segments.jsonl"
POLL_SECONDS: Final = 1.0
SAY_SECONDS: Final = 30.0


@dataclass
class Segments:
    """The passes of a run that follows a harvest: a `PassSource` with one pass per segment."""

    store: Store
    """The store as it was when the run began. It is opened again to find shards committed since."""
    folder: Path
    """The run's folder, where the segments are recorded. All nodes must share it."""
    leads: bool
    """Whether this process freezes segments. The other processes wait until it has recorded them."""
    make_pass: Callable[[Store], StorePass]
    least: int
    """The fewest shards in a segment."""
    content: Callable[[Store], str]
    """Returns the content digest of a store's committed shards (train/data/snapshot.py)."""
    frozen: list[StorePass] = field(default_factory=list)
    """The passes of the segments known so far, in order."""
    growing: GrowingStore = field(init=False)
    read: NDArray[np.bool_] = field(init=False)
    """Whether each shard of the store is in one of `frozen`."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.growing = GrowingStore(self.store.files)
        self.read = np.zeros(self.store.spec.n_shards, bool)

    def open(self) -> None:
        self.closed.clear()

    def get(self, epoch: int) -> StorePass:
        if epoch < len(self.frozen):
            return self.frozen[epoch]
        with self.lock:
            while len(self.frozen) <= epoch:
                self.frozen.append(self.next_segment())
                self.read[self.frozen[-1].rows.store.commits.shards] = True
            return self.frozen[epoch]

    def close(self) -> None:
        self.closed.set()

    def next_segment(self) -> StorePass:
        """Returns the pass of the next segment, and waits until there is one. Raises Interrupted after `close`."""
        last_said = time.monotonic() - SAY_SECONDS + 5
        while True:
            shards = self.recorded(len(self.frozen))
            store = self.growing.open()
            if shards is None and self.leads:
                shards = self.freeze(store)
            if shards is not None:
                return self.make_pass(self.checked(store, shards))
            if time.monotonic() - last_said > SAY_SECONDS:
                last_said = time.monotonic()
                say(waiting_text(store))
            if self.closed.wait(POLL_SECONDS):
                raise Interrupted("stopped while waiting for the harvest")

    def recorded(self, number: int) -> list[int] | None:
        """Returns the shards of segment `number` as they were recorded, or None when it is not recorded yet."""
        found = segments_of(self.folder)
        return found[number][0] if number < len(found) else None

    def freeze(self, store: Store) -> list[int] | None:
        """Records the next segment once all its shards are committed. Returns them, or None before."""
        shards = self.next_shards()
        if not all(shard in store.commits for shard in shards):
            return None
        body = {"v": 1, "segment": len(self.frozen), "shards": shards, "snapshot": self.content(store.only(shards))}
        LocalFiles(self.folder).append(SEGMENTS, sealed(body).encode(), len(self.frozen))
        return shards

    def next_shards(self) -> list[int]:
        """Returns the shards of the next segment: what is not read of the first one that is not read whole, else all.
        A run of an earlier version read shards in the order of their commits, and continues with those it has not."""
        if self.read.all():
            return list(range(len(self.read)))
        planned = segment_with(int(np.argmin(self.read)), len(self.read), self.least)
        return [shard for shard in planned if not self.read[shard]]

    def checked(self, store: Store, shards: list[int]) -> Store:
        """Returns the store restricted to the segment's shards. Raises UserError when they are not those that were
        frozen."""
        gone = sorted(set(shards) - set(store.commits))
        if gone:
            raise UserError(f"{store.name}: shards {gone}, which this run has trained on, are no longer committed")
        part = store.only(shards)
        named = segments_of(self.folder)[len(self.frozen)][1]
        if named not in (self.content(part), part.snapshot_id):  # earlier versions recorded the manifest's digest
            raise UserError(f"{store.name}: its shards changed since this run began. Restart the run with --overwrite")
        return part

    def wait_for_shards(self, shards: set[int], stop_asked: Callable[[], bool]) -> Store:
        """Waits until all of `shards` are committed and returns the store. Raises Interrupted when a stop is asked
        for."""
        last_said, growing = time.monotonic(), GrowingStore(self.store.files)
        while True:
            store = growing.open()
            if all(shard in store.commits for shard in shards):
                return store
            if time.monotonic() - last_said > SAY_SECONDS:
                last_said = time.monotonic()
                say(waiting_text(store))
            if stop_asked():
                raise Interrupted("stopped while waiting for held-out shards. Run the same command again")
            time.sleep(POLL_SECONDS)


def segment_with(shard: int, n_shards: int, least: int) -> range:
    """Returns the segment that holds `shard`: neighbours, at least `least` of them (all, where there are fewer). The
    segments of a store are as equal as possible."""
    count = max(1, n_shards // least)
    number = ((shard + 1) * count - 1) // n_shards
    return range(number * n_shards // count, (number + 1) * n_shards // count)


def waiting_text(store: Store) -> str:
    """Says how many shards are committed, and what to do when nothing writes the store."""
    note = ""
    if store.files.at_work() is False:
        note = ". No harvest is writing into it: run the same sagsae harvest command again"
    if note and is_served(store.name):
        note = ". No job is writing into it: look at sagsae jobs ls, then at sagsae jobs retry"
    return f"waiting for {store.name}: {len(store.commits)} of {store.spec.n_shards} shards are committed{note}"


def segments_of(folder: Path) -> list[tuple[list[int], str]]:
    """Returns the shards and the content digest of every segment recorded in a run's folder. A torn last line counts as
    not written yet. Raises DamagedError when any other line was altered."""
    try:
        lines = read_whole(folder / SEGMENTS, WHOLE_BYTES).decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines):
        try:
            body = unsealed(line)
            if body is None and number == len(lines) - 1 and not line.endswith("\n"):
                break
            found.append(segment(body))
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"{folder / SEGMENTS}: line {number + 1} is damaged. Restore it from a copy, or restart the run with "
                "--overwrite"
            ) from error
    return found


def check_segments(store: Store, folder: Path, content: Callable[[Store], str]) -> None:
    """Raises UserError when the store's shards no longer hold what the run in `folder` read in one of its segments."""
    for shards, named in segments_of(folder):
        gone = [shard for shard in shards if shard not in store.commits]
        if gone:
            raise UserError(f"{folder}: was trained on shard {gone[0]}, which {store.name} does not have")
        part = store.only(shards)
        if named not in (content(part), part.snapshot_id):
            raise UserError(f"{folder}: was not trained on the rows that {store.name} holds now. It is another store")


def segment(body: Any) -> tuple[list[int], str]:
    """Returns the shards and the content digest of one line of segments.jsonl. Raises BadData for anything else."""
    body = members(body, ("shards", "snapshot"), None)
    if not isinstance(body["shards"], list) or not body["shards"]:
        raise BadData("a segment has no shards")
    return [integer(shard, "a shard") for shard in body["shards"]], text(body["snapshot"], "snapshot")
