"""Which rows a run reads: named by what is in them, not by where they are, their names or how they are encoded.

A run records the numbers of its shards and one digest over what identifies their content. A recode copies every file
but the activations byte for byte, the row norms and moments too: so the committed checksums of these files are equal
across lossless codecs, and differ where the activations do. Int8 has one encoding, and all its files count.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import DamagedError, UserError
from shared.files.local import LocalFiles
from shared.gate import BadData, quoted
from shared.store.commits import KEPT
from shared.store.manifest import INDEX
from shared.store.opened import STATE_FILE, Store

FOLLOWS: Final = "follows "
EARLIER: Final = re.compile(r"[0-9a-f]{8}-[0-9]+")
"""A snapshot as an earlier sagsae named it: by all bytes of the manifest."""


def content_of_spec(store: Store, hook: str) -> str:
    """A digest of all in a store's description that decides the rows of one hookpoint and their order."""
    spec = store.spec
    decides = {
        "ids": spec.corpus["ids_blake2b"],
        "context": spec.context,
        "special_ids": list(spec.special_ids),
        "skip_positions": spec.skip_positions,
        "n_tokens": spec.n_tokens,
        "hook_name": spec.hookpoints[hook].name,
        "d_in": spec.hookpoints[hook].d_in,
        "dtype": spec.dtype,
        "quantised": spec.quantised,
        "chunk_rows": spec.chunk_rows,
        "shard_rows": spec.shard_rows,
        "seed": spec.seed,
    }
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def arrays_of(store: Store, hook: str) -> list[str]:
    """The arrays that one hookpoint's rows are read from, or with, that a lossless recode leaves as they are."""
    paths = ["index/context", "index/position", *(f"stats/{hook}/{name}" for name in ("norm", "sum", "sum_of_squares"))]
    if store.spec.quantised:
        paths += [hook, f"scale/{hook}/row", f"scale/{hook}/dim", f"stats/{hook}/sum_of_squared_error"]
    return paths


def content_of(store: Store, hook: str, exact: bool = False) -> str:
    """A digest of the rows of one hookpoint in the committed shards. `exact`: of their encoding, too."""
    paths = [*arrays_of(store, hook), *([hook] if exact else [])]
    digest = hashlib.blake2b(content_of_spec(store, hook).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(table_of(store, paths).T, "<i8").tobytes())
    return digest.hexdigest()


def table_of(store: Store, paths: Sequence[str]) -> NDArray[np.int64]:
    """A line for each committed shard, sorted: its number, its rows, where they begin and end, and the length and
    crc32 of each of its files. [shards, 4 + 2 * paths]."""
    columns = store.commits.columns
    places = [columns.places[path] for path in paths]
    files = np.stack([columns.sizes[:, places], columns.crcs[:, places].astype(np.int64)], axis=2)
    return np.hstack([columns.numbers[:, :KEPT], files.reshape(len(columns), -1)])


def is_earlier(identity: dict[str, Any]) -> bool:
    """Whether an earlier sagsae began the run, which named snapshots otherwise and cut long warm-ups."""
    return re.fullmatch(rf"{EARLIER.pattern}|{FOLLOWS}[0-9a-f]{{8}}", str(identity.get("snapshot"))) is not None


def follows(store: Store, hook: str) -> str:
    """Stands for a snapshot where all that the store will be is read."""
    return FOLLOWS + content_of_spec(store, hook)


# Numbers of shards as a text: "0-4,7"


def as_ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 7]` -> `0-2,7`. A store of any size that was committed from its beginning is one range."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def from_ranges(text: Any, most: int) -> list[int]:
    """The numbers, all below `most`. Raises BadData."""
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,13}(-[0-9]{1,13})?(,[0-9]{1,13}(-[0-9]{1,13})?)*", text):
        raise BadData(f"shards is {quoted(text)} instead of numbers such as 0-4,7")
    numbers: list[int] = []
    last = -1
    for part in text.split(","):
        first, _, end = part.partition("-")
        low, high = int(first), int(end or first)
        if not last < low <= high:
            raise BadData(f"shards is {quoted(text)}, which is not in order")
        if high >= most:
            raise BadData(f"shards is {quoted(text)}; the store has {most:,} shards")
        numbers += range(low, high + 1)
        last = high
    return numbers


# Finding them again


def as_recorded(store: Store, hook: str, identity: dict[str, Any], what: str) -> Store:
    """The store with those shards alone that a run read. `identity` is the run's config.json, `what` its folder. Raises
    UserError when the store lacks one of them, or holds something else in it."""
    snapshot = str(identity.get("snapshot"))
    if snapshot.startswith(FOLLOWS):
        if snapshot not in (follows(store, hook), f"{FOLLOWS}{store.spec_id}"):
            raise UserError(f"{what}: {another(store)}")
        return store
    if "shards" not in identity and EARLIER.fullmatch(snapshot):
        if snapshot != store.snapshot_id:
            raise UserError(
                f"{what}: was not trained on what {store.name} holds now: it grew since, or it is another store. Say "
                "where the right one is: --store"
            )
        return store
    try:
        shards = from_ranges(identity.get("shards"), store.spec.n_shards)
    except BadData as error:
        raise UserError(f"{what}: {another(store)} ({error})") from error
    gone = [shard for shard in shards if shard not in store.commits]
    if gone:
        raise UserError(
            f"{what}: was trained on shards {identity['shards']} of its store; {store.name} does not have "
            f"{len(gone):,} of them, such as shard {gone[0]}. Say where the right store is: --store"
        )
    part = store.only(shards)
    if content_of(part, hook) != snapshot:
        raise UserError(f"{what}: {another(store)}")
    return part


def another(store: Store) -> str:
    lossy = ". It is quantised to int8, which changes rows; lossless codecs keep them" if store.spec.quantised else ""
    return (
        f"was not trained on the rows that {store.name} holds now: it is another store, or was harvested anew{lossy}. "
        "Say where the right one is: --store"
    )


# A store that is replaced while it is read


@dataclass
class SnapshotWatch:
    """Notices that a store was replaced, or lost shards, while rows of it were read. One that grew is fine."""

    store: Store
    hook: str
    seen: object = None
    """What the files that describe the store looked like when they were last compared."""

    def check(self, parts: Sequence[Store], thorough: bool = False) -> None:
        """`parts`: what was read, each with the shards that were read of it. Costs a look at a few files where nothing
        changed since the last time. `thorough` compares all the same. Raises DamagedError."""
        looks = looks_of(self.store)
        if looks == self.seen and looks is not None and not thorough:
            return
        try:
            now = Store.open(self.store.files)
        except UserError as error:
            raise DamagedError(f"{self.store.name}: is gone while it was read. {AGAIN} ({error})") from error
        for part in parts:
            there = all(shard in now.commits for shard in part.commits)
            if not there or exact(now.only(list(part.commits)), self.hook) != exact(part, self.hook):
                raise DamagedError(f"{self.store.name}: was replaced, or lost shards, while it was read. {AGAIN}")
        self.seen = looks


AGAIN: Final = "Put the store back as it was and run the same command again; nothing read since is kept"


def exact(store: Store, hook: str) -> str | None:
    """None where the store does not have the hookpoint at all."""
    return content_of(store, hook, exact=True) if hook in store.spec.hookpoints else None


def looks_of(store: Store) -> object:
    """Of the files that say what is in a store: which they are, their sizes and times. For one that is not on a disk,
    its description itself. None where that cannot be told."""
    if not isinstance(store.files, LocalFiles):
        try:
            return store.files.read(STATE_FILE)
        except (OSError, UserError, DamagedError):
            return None
    looks: list[tuple[Any, ...]] = []
    for path in (STATE_FILE, INDEX, *store.files.logs("manifest", "rank-")):
        try:
            found = os.stat(store.root / path)
        except OSError:
            looks.append((path,))
        else:
            looks.append((path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return looks
