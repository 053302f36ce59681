"""Training while a harvest goes on: what is committed is taken in segments, and each segment is one pass.

A segment is frozen when enough new shards are committed for one window of every stream, and written down in the run's
folder before it is used: a run that goes on later, or another rank, sees the same segments although more shards exist
by then. When the harvest is complete the last segment takes the rest, and later passes read all of the store.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.errors import DamagedError, Interrupted, UserError
from shared.files.base import WHOLE_BYTES
from shared.files.local import LocalFiles, read_whole
from shared.files.locks import is_locked
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
    """The passes of a run that follows a harvest."""

    store: Store
    """As it was when the run began; opened again to see what came since."""
    folder: Path
    """The run's, in which the segments are written down. Several nodes have to share it."""
    leads: bool
    """Whether this process freezes segments; the others wait for what it writes down."""
    make_pass: Callable[[Store], StorePass]
    enough: Callable[[Store], bool]
    """Whether the new shards are enough for a segment."""
    content: Callable[[Store], str]
    """Names what is in the committed shards of a store (train/data/snapshot.py)."""
    frozen: list[StorePass] = field(default_factory=list)
    growing: GrowingStore = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.growing = GrowingStore(self.store.files)

    def open(self) -> None:
        self.closed.clear()

    def get(self, epoch: int) -> StorePass:
        if epoch < len(self.frozen):
            return self.frozen[epoch]
        with self.lock:
            while len(self.frozen) <= epoch:
                self.frozen.append(self.next())
            return self.frozen[epoch]

    def close(self) -> None:
        self.closed.set()

    def next(self) -> StorePass:
        """The segment after those known, waiting until there is one."""
        said = time.monotonic() - SAY_SECONDS + 5
        while True:
            shards = self.written(len(self.frozen))
            now = self.growing.open()
            if shards is None and self.leads:
                shards = self.freeze(now)
            if shards is not None:
                return self.make_pass(self.checked(now, shards))
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(self.waiting(now))
            if self.closed.wait(POLL_SECONDS):
                raise Interrupted("stopped while waiting for the harvest")

    def written(self, number: int) -> list[int] | None:
        """Segment `number` as it was written down; None when it is not there yet."""
        found = segments_of(self.folder)
        return found[number][0] if number < len(found) else None

    def freeze(self, now: Store) -> list[int] | None:
        """Chooses the next segment and writes it down; None while there are too few new shards."""
        used = [part.rows.store.commits.shards for part in self.frozen]
        fresh = now.commits.fresh(np.unique(np.concatenate([np.empty(0, np.int64), *used]))).tolist()
        complete = now.complete
        if not fresh and complete:
            shards = list(now.commits)
        elif fresh and (complete or self.enough(now.only(fresh))):
            shards = fresh
        else:
            return None
        body = {"v": 1, "segment": len(self.frozen), "shards": shards, "snapshot": self.content(now.only(shards))}
        LocalFiles(self.folder).append(SEGMENTS, sealed(body).encode(), len(self.frozen))
        return shards

    def checked(self, now: Store, shards: list[int]) -> Store:
        """The segment's shards. Raises UserError when they are not the ones that were frozen."""
        gone = sorted(set(shards) - set(now.commits))
        if gone:
            raise UserError(f"{now.name}: shards {gone}, which this run has trained on, are not committed any more")
        part = now.only(shards)
        named = segments_of(self.folder)[len(self.frozen)][1]
        if named not in (self.content(part), part.snapshot_id):  # an earlier sagsae named all bytes of the manifest
            raise UserError(f"{now.name}: its shards changed since this run began. Start afresh with --overwrite")
        return part

    def waiting(self, now: Store) -> str:
        at_work = not isinstance(now.files, LocalFiles) or is_locked(now.files.root) is not False
        note = "" if at_work else ". Nobody is harvesting into it: run the same sagsae harvest command again"
        return f"waiting for {now.name}: {len(now.commits)} of {now.spec.n_shards} shards are committed{note}"

    def complete(self, shards: set[int], stop_asked: Callable[[], bool]) -> Store:
        """The store once these shards are committed."""
        said, growing = time.monotonic(), GrowingStore(self.store.files)
        while True:
            now = growing.open()
            if all(shard in now.commits for shard in shards):
                return now
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(self.waiting(now))
            if stop_asked():
                raise Interrupted("stopped while waiting for held-out shards. Run the same command again")
            time.sleep(POLL_SECONDS)


def segments_of(folder: Path) -> list[tuple[list[int], str]]:
    """The shards of each segment that is written down, and what names their content. A last line that was torn is not
    written yet. Raises DamagedError for any other that was altered."""
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
                f"{folder / SEGMENTS}: line {number + 1} is damaged. Restore it from a copy, or start afresh with "
                "--overwrite"
            ) from error
    return found


def check_segments(store: Store, folder: Path, content: Callable[[Store], str]) -> None:
    """Raises UserError when a segment that the run in `folder` read is not what the store has in its shards."""
    for shards, named in segments_of(folder):
        gone = [shard for shard in shards if shard not in store.commits]
        if gone:
            raise UserError(f"{folder}: was trained on shard {gone[0]}, which {store.name} does not have")
        part = store.only(shards)
        if named not in (content(part), part.snapshot_id):
            raise UserError(f"{folder}: was not trained on the rows that {store.name} holds now. It is another store")


def segment(body: Any) -> tuple[list[int], str]:
    """Raises BadData."""
    body = members(body, ("shards", "snapshot"), None)
    if not isinstance(body["shards"], list) or not body["shards"]:
        raise BadData("a segment has no shards")
    return [integer(shard, "a shard") for shard in body["shards"]], text(body["snapshot"], "snapshot")
